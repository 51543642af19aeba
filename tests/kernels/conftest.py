"""The kernels' tests: Triton runs on the GPU where there is one, else in its interpreter.

The variable stays set for the whole test process and those it starts.  It changes nothing elsewhere: on CPU tensors
no operator chooses Triton by itself.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    if os.environ.get("TRITON_INTERPRET") != "1" and "triton" in sys.modules:
        raise RuntimeError(
            "triton was imported before tests/kernels could turn its interpreter on (it is read when triton is "
            "imported): run tests/kernels in a process of its own, or find what imports triton at collection"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.kernels.interpreter import repair

    repair()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests of Triton kernels put their tensors: the GPU, or the CPU (and Triton interprets)."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton isn't installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest), in C++ scratch too: reading what was never written shows.

    A module asks for it with pytestmark = pytest.mark.usefixtures("poisoned_memory").
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")  # (use_deterministic_algorithms() imports the compiler first)
    yield
    torch.set_deterministic_debug_mode(before)
