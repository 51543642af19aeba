"""Builds gr-kernels: pure Python, plus the C++ operators (gr_kernels._C) where a C++ compiler works.

Run with pip's --no-build-isolation, so that the operators are compiled against the torch they will run with.
"""

from __future__ import annotations

import glob
import os
import subprocess
import sys
import tempfile
from typing import Any

from setuptools import setup

FOLDER = os.path.dirname(os.path.abspath(__file__))


def missing_for_a_build() -> str:
    """What stands in the way of compiling the operators, or "" when nothing does."""
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


def extension() -> dict[str, Any]:
    """The ext_modules and cmdclass of setup(): the operators, or nothing and one line that says why."""
    missing = missing_for_a_build()
    if missing:
        print(f"gr-kernels: installing without the C++ operators: {missing}.", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # No -march: the sources choose the instruction set when they run (csrc/simd.h). Contraction into fused
    # multiply-adds is on; reordering of sums (-ffast-math) is not, results must not depend on the compiler's mood.
    flags = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    sources = sorted(glob.glob("csrc/*.cpp", root_dir=FOLDER))
    headers = sorted(glob.glob("csrc/*.h", root_dir=FOLDER))
    module = CppExtension(
        "gr_kernels._C",
        sources,
        depends=headers,
        extra_compile_args=flags + openmp,
        extra_link_args=openmp,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
