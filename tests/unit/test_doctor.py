"""The doctor on this environment, on broken ones, and the environment record of a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import gr
from gr import config as configs, doctor
from gr.train import environment, job
from tests.end_to_end.tiny import make_dataset, write_config

ROOT = Path(__file__).resolve().parents[2]


def run_doctor(python: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, str(ROOT / "launch" / "doctor.py")]
    return subprocess.run(
        command, capture_output=True, text=True, env={**clean, "COLUMNS": "200", **env}, timeout=300
    )


@pytest.mark.parametrize(
    ("version", "constraint", "expected"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.0", "==2.13", True),
        ("2.13.1", "==2.13.0", False),
        ("2.13.1", "==2.13.*", True),
        ("3.7.2", ">=3.7,<3.8", True),
        ("3.8.0", ">=3.7,<3.8", False),
        ("3.10.0", ">=3.9", True),
        ("5.0.0rc1", "!=5.0.0", False),
        ("1.0", ">1.0", False),
        ("1.0.1", ">1.0", True),
        ("1.0", "<=1.0.0", True),
    ],
)
def test_version_constraints(version, constraint, expected):
    assert doctor.satisfies(version, constraint) is expected


def test_a_constraint_it_does_not_know_is_refused():
    with pytest.raises(ValueError, match="not understood"):
        doctor.satisfies("1.0", "~=1.0")


def test_tested_set_is_read_and_understood():
    tested = doctor.tested_set(doctor.TESTED_SET)
    assert (
        tested["torch"].startswith("==")
        and {"torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "triton"} <= tested.keys()
    )
    for constraint in tested.values():
        doctor.satisfies("1.0", constraint)  # raises where it can't be read
    assert doctor.tested_set(ROOT / "no such file") == {}


def test_this_environment_is_healthy():
    done = run_doctor(sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "broken " not in done.stdout.replace("0 broken", "")
    assert "torch" in done.stdout and not done.stderr


def test_an_empty_environment_is_reported_not_raised(tmp_path):
    venv.create(tmp_path / "empty", with_pip=False)
    done = run_doctor(str(tmp_path / "empty" / "bin" / "python"))
    assert done.returncode == 1 and done.stderr == ""
    for package in ("torch", "numpy", "pyarrow", "pydantic", "rich"):
        assert any(
            line.startswith("broken") and f" {package} " in line for line in done.stdout.splitlines()
        ), package
    assert "make setup" in done.stdout


def broken_package(folder: Path, name: str, content: str, version: str = "0.1", needs: str = "") -> None:
    """An importable package with metadata, as pip would have left it."""
    (folder / name.replace("-", "_")).mkdir(parents=True)
    (folder / name.replace("-", "_") / "__init__.py").write_text(content)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")


def test_mismatches_are_named_with_their_fix(tmp_path, monkeypatch):
    broken_package(tmp_path, "torchrec", "raise OSError('undefined symbol: _ZN3c10')\n", version="1.8.0")
    broken_package(tmp_path, "fbgemm-gpu-cpu", "", version="1.5.0")
    broken_package(tmp_path, "apex", "", version="0.9.10")
    broken_package(tmp_path, "ray", "", version="2.9.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("torchrec", "apex", "ray"):  # other tests may have imported the real ones
        monkeypatch.setitem(sys.modules, module, None)  # so that it comes back afterwards, or goes
        del sys.modules[module]
    tested = doctor.tested_set(doctor.TESTED_SET)
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    findings = {f.what: f for f in doctor.examine(tested)}
    assert findings["torchrec"].state == "broken" and "undefined symbol" in findings["torchrec"].detail
    fbgemm = findings["fbgemm-gpu-cpu"]
    assert fbgemm.state == "broken" and "1.5.0; 1.8.0 is the one that fits" in fbgemm.detail
    assert "pip install --no-deps --force-reinstall fbgemm-gpu-cpu==1.8.0" in fbgemm.fix
    assert findings["apex"].state == "broken" and "pip uninstall -y apex" in findings["apex"].fix
    assert findings["ray"].state == "warning" and ">=2.60" in findings["ray"].detail


def test_both_fbgemm_builds_are_a_conflict(tmp_path, monkeypatch):
    for name in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
        info = tmp_path / f"{name.replace('-', '_')}-1.8.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.8.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    findings = {f.what: f for f in doctor.examine({})}
    assert findings["fbgemm"].state == "broken" and "pip uninstall -y fbgemm-gpu " in findings["fbgemm"].fix


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def fails(tested):
        raise RuntimeError("no such thing\nsecond line")

    monkeypatch.setattr(doctor, "_compiler", fails)
    broken = [f for f in doctor.examine({}) if f.state == "broken"]
    assert [f.detail for f in broken] == ["the check failed: RuntimeError: no such thing"]


def test_report_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    text = doctor.report([doctor.Finding("torch", "broken", "not [installed]", "make setup")])
    assert "not [installed]" in text and "fix: make setup" in text and "1 broken" in text


def test_environment_record(monkeypatch):
    secret = "hunter" + "2"
    argv = ["train.py", f"data.path=s3://me:{secret}@bucket/x?token={secret}", f"my_token={secret}"]
    argv += ["train.epochs=3", "--api-key", secret, f"s3://me:{secret}@bucket/y"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    record = environment.record()
    text = json.dumps(record)
    assert secret not in text
    assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", text)
    shown = ["train.py", "data.path=s3://bucket/x?<hidden>", "my_token=<hidden>", "train.epochs=3"]
    assert record["argv"] == [*shown, "--api-key", "<hidden>", "s3://bucket/y"]
    assert record["packages"]["torch"] and record["packages"]["numpy"] and record["gr"]
    assert record["cpu"]["torch_threads"] >= 1 and record["cpu"]["usable_cores"] >= 1
    if (ROOT / ".git").exists() and record["code"]:
        assert len(record["code"].removesuffix("+changes")) == 40


def test_operators_that_are_missing_are_said_when_a_run_begins(tmp_path, monkeypatch, caplog):
    make_dataset(tmp_path / "data")
    wanted = ["train.epochs=1", "train.max_steps=1"]
    config = configs.load(write_config(tmp_path, tmp_path / "data", tmp_path / "whole"), wanted)

    def said() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name.startswith("gr.")]

    job.run(config)
    assert environment.operators() == "compiled" and not said()
    broken = "the C++ operators were built for another torch: undefined symbol (reinstall gr_kernels)"
    monkeypatch.setattr(environment, "operators", lambda: broken)
    job.run(configs.override(config, [f"run.dir={tmp_path / 'broken'}"]))
    assert said() == [
        f"the C++ operators are not used ({broken}): training on CPU is slower without; "
        "python -m gr doctor names the fix"
    ]
    assert environment.missing_operators("cuda") is None


def test_the_code_of_a_run_is_a_commit_only_where_these_files_are_tracked(tmp_path, monkeypatch):
    """An installed package in an environment inside somebody's checkout is not of that checkout's commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    package = tmp_path / ".venv" / "gr"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "theirs.py").write_text("")
    monkeypatch.setattr(gr, "__file__", str(package / "__init__.py"))
    assert environment.code_version() is None
    for command in (["init", "-q"], ["add", "theirs.py"], ["commit", "-q", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    assert environment.code_version() is None
    subprocess.run([*git, "add", "-f", ".venv/gr/__init__.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    commit = environment.code_version()
    assert commit is not None and re.fullmatch("[0-9a-f]{40}", commit)
    (package / "__init__.py").write_text("changed = True\n")
    assert environment.code_version() == f"{commit}+changes"


def test_changes_of_a_config_that_is_not_there_are_refused(capsys):
    from gr.programs import doctor as program

    for words in (["train.seed=2"], ["--cluster", "train.seed=2"]):
        assert program.main(words) == 2
        assert "'train.seed=2' changes a config, and there is none" in capsys.readouterr().err
