"""Whether Triton can run: what stands in its way is said, never raised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gr_kernels.triton_common.available import why_unavailable

pytest.importorskip("triton")

# A process in which CUDA seems to be there and everything else is real: Triton finds no launcher in its fresh cache and
# must build one, with the compiler that it is given.
_ASK = """
import torch
torch.cuda.is_available = lambda: True
torch.version.cuda = "13.0"
torch.cuda.get_device_capability = lambda *a: (9, 0)
torch.cuda.current_device = lambda: 0
from triton.backends.nvidia import driver
driver.library_dirs = lambda: []
from gr_kernels.triton_common.available import why_unavailable
print(why_unavailable(torch.device("cuda", 0)))
"""


@pytest.mark.parametrize(
    ("compiler", "reason"), [(None, "Failed to find C compiler"), ("false", "false failed with status 1")]
)
def test_without_a_c_compiler(compiler: str | None, reason: str, tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")
    }
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"PATH": "/nonexistent"} if compiler is None else {"CC": compiler}
    done = subprocess.run(
        [sys.executable, "-c", _ASK], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    sentence = done.stdout.strip()
    assert "\n" not in sentence and sentence.startswith(
        "Triton can't build its launcher, for which it needs a C "
    )
    assert reason in sentence


def test_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "tensors are on CPU" in why_unavailable(torch.device("cpu"))
    assert "NVIDIA GPUs, not xpu" in why_unavailable(torch.device("xpu"))
