"""Builds gr-kernels: pure Python, plus compiled operators (gr_kernels._C) where there are compilers for them.

C++ operators for the CPU need a C++ compiler. CUDA operators need that, a torch built for CUDA, and nvcc of the same
major version of CUDA. What can't be built is left out with one line that says why, and runs as Triton or PyTorch.

Run with pip's --no-build-isolation, so that the operators are compiled against the torch they will run with.
"""

from __future__ import annotations

import glob
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

from setuptools import setup

FOLDER = os.path.dirname(os.path.abspath(__file__))
# A100, H100/H200 with what only they have (wgmma), and code that later GPUs compile for themselves.
ARCHITECTURES = "8.0;9.0a;9.0+PTX"


def missing_for_cpp() -> str:
    """What stands in the way of compiling the C++ operators, or "" when nothing does."""
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError as error:
        return f"torch can't be imported by the build ({error}; use pip install --no-build-isolation)"
    compiler = get_cxx_compiler()
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w") as file:
            file.write("#include <vector>\nint main() { return std::vector<int>{0}[0]; }\n")
        try:
            command = [compiler, "-std=c++20", source, "-o", os.path.join(folder, "probe")]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.SubprocessError):
            return f"the C++ compiler '{compiler}' doesn't compile (set CXX to one that does)"
    return ""


def missing_for_cuda() -> str:
    """What stands in the way of compiling the CUDA operators, where the C++ operators can be; "" when nothing does."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = torch.version.cuda
    if wanted is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if CUDA_HOME is None:
        return f"there is no CUDA toolkit (install {wanted}'s, or set CUDA_HOME to where it is)"
    nvcc = os.path.join(CUDA_HOME, "bin", "nvcc")
    try:
        text = subprocess.run(
            [nvcc, "--version"], check=True, capture_output=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{nvcc} doesn't run ({error})"
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None or found.group(1) != wanted.split(".")[0]:
        version = ".".join(found.groups()) if found else "an unknown version"
        return f"{nvcc} is of CUDA {version}, torch of {wanted}"
    return ""


def files(*patterns: str) -> list[str]:
    return sorted(name for pattern in patterns for name in glob.glob(pattern, root_dir=FOLDER))


def extension() -> dict[str, Any]:
    """The ext_modules and cmdclass of setup(): the operators, or nothing and one line that says why."""
    missing = missing_for_cpp()
    if missing:
        print(f"gr-kernels: installing without compiled operators: {missing}.", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # No -march: the sources choose the instruction set when they run (csrc/simd.h). Contraction into fused
    # multiply-adds is on; reordering of sums (-ffast-math) is not, results must not depend on the compiler's mood.
    flags = [
        "-O3",
        "-g0",
        "-std=c++20",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wno-psabi",
    ]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    kind, sources, headers = CppExtension, files("csrc/*.cpp"), files("csrc/*.h")
    arguments: dict[str, Any] = {"extra_compile_args": flags + openmp}
    missing = missing_for_cuda()
    if missing:
        print(f"gr-kernels: building without the CUDA operators: {missing}.", file=sys.stderr)
    else:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        kind = CUDAExtension
        sources += files("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
        headers += files("csrc/cuda/*.h")
        arguments = {
            "extra_compile_args": {"cxx": flags + openmp, "nvcc": ["-O3", "-std=c++17"]},
            "define_macros": [("GR_KERNELS_WITH_CUDA", None)],
        }
    module = kind("gr_kernels._C", sources, depends=headers, extra_link_args=openmp, **arguments)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
