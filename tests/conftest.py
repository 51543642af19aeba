"""What all tests share: threads, where third-party data lies, which tests a machine can't run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# GR_TEST_THREADS: of each process.  One by default: inputs are small, and `make test` has a process for each core.
THREADS = int(os.environ.get("GR_TEST_THREADS", "1"))

# A folder for what all processes of a test session have to know of each other (tests/programs.py).
if _leads := "GR_TEST_SESSION" not in os.environ:
    os.environ["GR_TEST_SESSION"] = tempfile.mkdtemp(prefix="gr-tests-")

# Before torch is imported anywhere, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(THREADS)
# Processes that tests start see the checkout too, whether it is installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(THREADS)


def pytest_unconfigure() -> None:
    if _leads:
        shutil.rmtree(os.environ["GR_TEST_SESSION"], ignore_errors=True)


LONGEST_FIRST = ("end_to_end", "distributed", "kernels", "unit")
"""Folders, so that processes that share the files out end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.relative_to(ROOT / "tests").parts[0]))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A training run sets its own number of threads; the next test has the suite's."""
    import torch

    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)
    yield


def _find_data(name: str) -> Path:
    """The folder of third-party data ``name``; skips the test where it isn't."""
    given = os.environ.get("GR_TEST_DATA")
    root = Path(given) if given else ROOT.parent / "shared" / "data"
    folder = root / name
    if not folder.is_dir():
        where = f"GR_TEST_DATA={given}" if given else "../shared/data (or set GR_TEST_DATA)"
        pytest.skip(f"no folder '{name}' in {where}")
    return folder


@pytest.fixture(scope="session")
def test_data():
    """``test_data("ml-1m")``: the folder with the data set's raw files; the test is skipped where there is none."""
    return _find_data


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The repository's root."""
    return ROOT
