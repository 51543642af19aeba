"""The CUDA operators without a GPU: kernels compile and don't spill, bindings fit torch's headers, row arithmetic runs.

What this can't tell is whether they run: tests/kernels/test_jagged.py and test_bias_table_gradient.py do where there is
a GPU and a build with CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "kernels" / "csrc" / "cuda"
SOURCES = sorted(path.name for path in CUDA.glob("*.cu"))
BINDINGS = sorted(path.name for path in CUDA.glob("*.cpp"))


def found(program: str) -> str:
    path = shutil.which(os.environ.get("CXX", program) if program == "c++" else program)
    if path is None:
        pytest.skip(f"there is no {program} here")
    return path


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_there_are_sources() -> None:
    assert "jagged.cu" in SOURCES and "bias_table_gradient.cu" in SOURCES
    assert len(BINDINGS) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_compile_without_spills(source: str, architecture: str, tmp_path: Path) -> None:
    nvcc = found("nvcc")
    # -std and -O as in kernels/setup.py
    flags = [
        "-std=c++17",
        "-O3",
        f"-arch={architecture}",
        "-cubin",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
    ]
    report = run([nvcc, *flags, str(CUDA / source), "-o", str(tmp_path / "kernels.cubin")])
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    assert spills, f"ptxas says nothing about spills:\n{report}"
    assert not any(spills), report


@pytest.mark.slow
def test_bindings_fit_torch(tmp_path: Path) -> None:
    """Against the headers of this torch; its builds for the CPU lack one generated header, which is made up here."""
    import torch
    from torch.utils.cpp_extension import include_paths

    nvcc, compiler = found("nvcc"), found("c++")
    toolkit = next(
        (p / "include" for p in [*map(Path, filter(None, [os.environ.get("CUDA_HOME")])), Path("/usr/local/cuda"),
                                 Path(nvcc).resolve().parents[1]] if (p / "include" / "cuda_runtime_api.h").exists()),
        None,
    )  # fmt: skip
    if toolkit is None:
        pytest.skip("the CUDA toolkit's headers aren't beside its nvcc")
    paths = [*include_paths(), str(toolkit)]
    generated = "c10/cuda/impl/cuda_cmake_macros.h"
    if torch.version.cuda is None and not any((Path(p) / generated).exists() for p in paths):
        header = tmp_path / generated
        header.parent.mkdir(parents=True)
        header.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
        paths.append(str(tmp_path))
    includes = [argument for path in paths for argument in ("-isystem", path)]
    all_of_them = tmp_path / "bindings.cpp"  # reading torch's headers takes most of the time
    all_of_them.write_text("".join(f'#include "{CUDA / binding}"\n' for binding in BINDINGS))
    run([compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", *includes, str(all_of_them)])


def test_row_arithmetic_runs(tmp_path: Path) -> None:
    """Small parts joined and split, and rows past 2^33: by the code of the kernels, on the CPU."""
    program = tmp_path / "rows"
    (tmp_path / "cuda_runtime_api.h").write_text("typedef void* cudaStream_t;\ntypedef int cudaError_t;\n")
    here = Path(__file__).parent / "cuda_rows.cpp"
    command = [
        found("c++"),
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Werror",
        "-fsanitize=undefined,address",
        f"-I{CUDA}",
    ]
    run([*command, f"-I{tmp_path}", str(here), "-o", str(program)])
    assert run([str(program)]).strip() == "ok"
