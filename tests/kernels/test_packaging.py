"""What gr-kernels' sdist and wheel hold, and that the wheel works by itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # (the builds put their own arguments there)
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""


def test_license_is_the_projects(checkout: Path) -> None:
    assert (checkout / "kernels" / "LICENSE").read_bytes() == (checkout / "LICENSE").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools isn't installed")
def test_sdist_and_wheel_are_complete_and_run_without_gr(checkout: Path, tmp_path: Path) -> None:
    source, built, installed = (tmp_path / name for name in ("source", "built", "installed"))
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info")
    shutil.copytree(checkout / "kernels", source, ignore=ignored)
    built.mkdir()
    # no compiler: a wheel of Python alone, in seconds
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(built)],
        cwd=source,
        env={**os.environ, "CXX": "false"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installing without compiled operators" in done.stderr

    package = {
        path.relative_to(source).as_posix()
        for path in (source / "gr_kernels").rglob("*")
        if path.suffix in (".py", ".md")
    }
    assert "gr_kernels/hstu_attention/README.md" in package
    sources = {path.relative_to(source).as_posix() for path in (source / "csrc").rglob("*") if path.is_file()}
    (archive,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(archive) as tar:
        in_archive = {name.partition("/")[2] for name in tar.getnames()}
    assert not (package | sources | {"LICENSE", "README.md", "setup.py", "pyproject.toml"}) - in_archive
    with zipfile.ZipFile(wheel) as zipped:
        in_wheel = set(zipped.namelist())
        (text,) = (name for name in in_wheel if name.endswith("/LICENSE"))
        assert zipped.read(text) == (checkout / "LICENSE").read_bytes()
        zipped.extractall(installed)
    assert {name for name in in_wheel if name.startswith("gr_kernels/")} == package

    program = shutil.copy(checkout / "tests" / "kernels" / "standalone.py", tmp_path)
    # -S: without the import hook of an editable install, which would find the C++ operators of the checkout
    path = os.pathsep.join([str(installed), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-S", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{installed / 'gr_kernels'} without C++"
