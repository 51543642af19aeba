"""gr as a wheel installs it, with no checkout on the path: its programs, its configs, its Python interface."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("gr", "configs")
STREAM = ["records=600", "length=16", "items=100", "categories=10"]
SMALL = ["train.max_steps=4", "train.global_batch=32", "train.threads=1", "eval.batch=64"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of packages with gr from a wheel and the operators beside it."""
    folder = tmp_path_factory.mktemp("installed")
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for name in SOURCES:
        shutil.copy2(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    install = [*pip, "--no-index", "--no-build-isolation", "--target", str(site), str(source)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(source)
    # Compiling them again would take minutes: kernels/ is a package of its own, whose build others test.
    shutil.copytree(ROOT / "kernels" / "gr_kernels", site / "gr_kernels", ignore=ignored)
    return site


@pytest.fixture(scope="module")
def run(site, tmp_path_factory):
    """``run("-m", "gr", "train")`` in a folder far from the checkout; what it printed."""
    folder = tmp_path_factory.mktemp("elsewhere")

    def started(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    started.folder = folder
    return started


def test_a_wheel_holds_everything_and_nothing_else(site):
    packed = {f.relative_to(site / "gr").as_posix() for f in (site / "gr").rglob("*") if f.is_file()}
    packed = {name for name in packed if "__pycache__" not in name}
    modules = {f.relative_to(ROOT / "gr").as_posix() for f in (ROOT / "gr").rglob("*.py")}
    configs = {
        f"configs/{f.relative_to(ROOT / 'configs').as_posix()}" for f in ROOT.glob("configs/**/*.yaml")
    }
    assert packed == modules | configs | {"tested_set.txt"} and len(configs) > 30
    assert not any(f.is_symlink() for f in (site / "gr").rglob("*"))
    assert (site / "bin" / "gr").is_file()


@pytest.mark.slow
def test_the_whole_way_by_programs_and_from_python(run, site):
    """prepare, train, evaluate, recommend, describe; torchrun by the module's name; the same from Python."""
    run("-m", "gr", "prepare", "synthetic-dp", "--out", "data/s", "--set", *STREAM)
    trained = run(
        "-m", "gr", "train", "--config", "synthetic-dp/hstu-norab", "data.path=data/s", "run.dir=run", *SMALL
    )
    assert "python -m gr evaluate --run run" in trained
    run(str(site / "bin" / "gr"), "evaluate", "run", "--json", "one.json")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*torchrun, "-m", "gr.programs.evaluate", "run", "--json", "two.json")
    one, two = (json.loads((run.folder / f"{n}.json").read_text())["results"]["hstu"] for n in ("one", "two"))
    assert one["hr@10"] == two["hr@10"] and one["users"] == 60
    run("-m", "gr.programs.recommend", "run", "--users", "all", "--k", "5", "--out", "recs.parquet")
    assert "synthetic-dp" in run("-m", "gr", "describe", "data/s")
    tables = " ".join(run("-m", "gr", "reproduce", "--help").split())
    assert "adapters, amazon-beauty, amazon-books, kuairand" in tables
    environment = json.loads((run.folder / "run" / "environment.json").read_text())
    assert environment["code"] is None and environment["argv"][0] == "gr train"
    code = (
        "import sys; from pathlib import Path; from gr import config, train\n"
        f"done = train.run(config.load('configs/synthetic-dp/hstu-norab.yaml', {[*SMALL, 'data.path=data/s']!r}))\n"
        "print(done.evaluation('test')['hr@10'])\n"
        "files = [m.__file__ for n, m in list(sys.modules.items()) if n.partition('.')[0] in ('gr', 'gr_kernels')]\n"
        f"outside = [f for f in files if f and not Path(f).is_relative_to({str(site)!r})]\n"
        "assert len(files) > 50 and not outside, outside\n"
    )
    assert float(run("-c", code).splitlines()[-1]) == one["hr@10"]
