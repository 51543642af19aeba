"""The project's rules, held by tests: who imports whom, what stays light, what a tracked file may not say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gr import registry
from gr.config import ComponentConfig, Section

ROOT = Path(__file__).resolve().parents[2]

# Part of the system -> the parts of ours that it may import. Imports run downwards only.
KNOWN_TO_ALL = {
    "gr.config",
    "gr.batch",
    "gr.registry",
    "gr.errors",
    "gr.modes",
    "gr.processes",
    "gr.progress",
    "gr.launcher",
    "gr.shipped",
    "gr.labels",
}
BOTTOM = {"gr_kernels"}
LOWER = BOTTOM | {"gr.adapters", "gr.embeddings", "gr.modality"}
MAY_IMPORT = {
    "gr_kernels": set(),
    "gr.errors": set(),
    "gr.registry": {"gr.errors"},
    "gr.batch": {"gr.errors"},
    "gr.modes": set(),
    "gr.progress": set(),
    "gr.launcher": {"gr.errors"},
    "gr.processes": {"gr.errors", "gr.launcher"},
    "gr.shipped": {"gr.errors"},
    "gr.yaml12": {"gr.errors"},
    "gr.sections": {"gr.errors", "gr.registry"},
    "gr.overlay": {"gr.errors", "gr.sections", "gr.yaml12"},
    "gr.extends": {"gr.errors", "gr.sections", "gr.overlay", "gr.yaml12", "gr.shipped"},
    "gr.config": {
        *("gr.errors", "gr.registry", "gr.sections", "gr.overlay", "gr.extends", "gr.yaml12", "gr.shipped")
    },
    "gr.labels": {"gr.config", "gr.errors"},
    "gr.adapters": KNOWN_TO_ALL | BOTTOM,
    "gr.embeddings": KNOWN_TO_ALL | BOTTOM | {"gr.modality"},
    "gr.modality": KNOWN_TO_ALL | BOTTOM | {"gr.adapters", "gr.embeddings"},
    "gr.data": KNOWN_TO_ALL | LOWER,
    "gr.models": KNOWN_TO_ALL | LOWER,
    "gr.eval": KNOWN_TO_ALL | LOWER,
    "gr.scaling": KNOWN_TO_ALL | LOWER | {"gr.data", "gr.models", "gr.eval"},
    "gr.train": KNOWN_TO_ALL | LOWER | {"gr.data", "gr.models", "gr.eval", "gr.scaling"},
    "gr.doctor": BOTTOM,
    "gr.programs": KNOWN_TO_ALL | {"gr.data", "gr.eval", "gr.scaling", "gr.train", "gr.doctor"},
    "gr.__main__": {"gr.errors", "gr.programs"},
}
HEAVY = ("torch", "torchrec", "fbgemm_gpu", "ray", "deepspeed", "transformers", "triton")


def tracked_files() -> list[Path]:
    """Files of the repository: what git tracks or would, or (without git) all but caches and builds."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        names = [name for name in listing.split("\0") if name]
    except (OSError, subprocess.SubprocessError):
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
        hidden = re.compile(
            r"(^|/)(\.git|\.venv[^/]*|__pycache__|build|runs|data|\.[a-z]+_cache|.*\.egg-info)/"
        )
        names = [n for n in names if not hidden.search(n + "/") or n.startswith("gr/data/")]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def sources(*folders: str) -> list[Path]:
    return sorted(
        p for f in folders for p in (ROOT / f).rglob("*.py") if "build" not in p.relative_to(ROOT).parts
    )


def imported_modules(file: Path, package: str) -> Iterator[tuple[str, int]]:
    """Absolute names of all that a file imports, wherever in it, except for type checkers only."""

    def visit(node: ast.AST) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child)
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(file.read_text(), str(file)))


def part_of(module: str) -> str | None:
    """``gr.data.split`` -> ``gr.data``; None for what isn't ours."""
    words = module.split(".")
    if words[0] == "gr_kernels":
        return "gr_kernels"
    if words[0] == "gr" and len(words) > 1:
        return ".".join(words[:2])
    return None


def module_name(file: Path) -> str:
    root = ROOT / "kernels" if file.is_relative_to(ROOT / "kernels") else ROOT
    return ".".join(file.relative_to(root).with_suffix("").parts)


def test_imports_run_downwards():
    wrong = []
    for file in sources("gr", "kernels/gr_kernels"):
        module = module_name(file)
        part = part_of(module)
        if part is None or part == "gr.__init__":
            continue
        assert part in MAY_IMPORT, f"{file.relative_to(ROOT)}: say in MAY_IMPORT what {part} may import"
        for imported, line in imported_modules(file, module.rpartition(".")[0]):
            words = imported.split(".")
            if words[0] in ("launch", "benchmarks", "tests"):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {imported}")
            target = part_of(imported)
            if target in MAY_IMPORT and target != part and target not in MAY_IMPORT[part]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {imported}")
    assert not wrong, "imports that run upwards or sideways:\n" + "\n".join(sorted(set(wrong)))


# What would lead out of a package from one of its files. The one that looks outside asks git whose files they are
# (gr.train.environment.code_version), and starts from its own folder.
_UPWARDS = re.compile(
    r"\bparents\s*\[|\.parent\.parent\b|\bos\.pardir\b|\bROOT\b|(?<![\w./])(launch|configs)/"
)
"""Also the names of folders that an installed package doesn't have: docstrings may speak of them, code may not."""


def ways_out(file: Path) -> Iterator[str]:
    """Places in a file's code, docstrings and comments left out, that reach beyond the package."""
    tree = ast.parse(file.read_text(), str(file))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            node.body = [
                statement
                for statement in node.body
                if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
            ]
    for line in ast.unparse(tree).splitlines():
        if _UPWARDS.search(line):
            yield line.strip()


ALLOWED_WAYS_OUT = {
    "gr/shipped.py": ["key = Path(name).as_posix().removeprefix('configs/').removesuffix('.yaml')"],
}
"""Names of shipped configs as the README writes them; no path is made of them outside the package."""


def test_the_library_reaches_nothing_outside_itself_by_path():
    found = {}
    for file in sources("gr", "kernels/gr_kernels"):
        name = str(file.relative_to(ROOT))
        if lines := [line for line in ways_out(file) if line not in ALLOWED_WAYS_OUT.get(name, [])]:
            found[name] = lines
    assert not found, f"an installed package has no checkout around it: {found}"


@pytest.mark.parametrize(
    "package",
    [
        *("gr", "gr_kernels", "gr.config", "gr.registry", "gr.errors", "gr.batch", "gr.doctor", "gr.shipped"),
        *("gr.launcher", "gr.__main__", "gr.programs.train", "gr.programs.doctor", "gr.programs.reproduce"),
    ],
)
def test_import_is_light(package):
    code = f"import sys, {package}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"import {package} brings in {done.stdout}"


def test_a_job_does_not_bring_in_the_compiler():
    """It takes longer to import than all of gr."""
    code = "import sys, gr.train.job, gr.models.hstu, gr.models.objectives; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_waiting_threads_spin_shortly_unless_told_otherwise():
    code = "import os, gr; print(os.environ.get('GOMP_SPINCOUNT'))"
    base = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, expected in (
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ):
        environment = base | given
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        assert done.stdout.strip() == expected, (given, done.stderr)


def test_programs_do_not_hide_the_standard_library():
    hidden = [p.name for p in (ROOT / "launch").rglob("*.py") if p.stem in sys.stdlib_module_names]
    assert not hidden, f"launch/ is first on the path of its programs: rename {hidden}"


@pytest.mark.parametrize("program", [p.stem for p in (ROOT / "launch").glob("*.py")])
def test_programs_say_what_they_do(program):
    """--help prints the program's own first line and ends well."""
    file = ROOT / "launch" / f"{program}.py"
    done = subprocess.run([sys.executable, file, "--help"], capture_output=True, text=True, timeout=60)
    first, code = (
        ast.get_docstring(ast.parse(f.read_text())).splitlines()[0]
        for f in (file, ROOT / "gr" / "programs" / file.name)
    )
    assert done.returncode == 0, done.stderr
    assert first == code and code in done.stdout and "usage:" in done.stdout


def test_every_program_is_in_both_places():
    programs = {p.name for p in (ROOT / "gr" / "programs").glob("[!_]*.py")}
    assert programs == {p.name for p in (ROOT / "launch").glob("*.py")} and "train.py" in programs


@pytest.mark.parametrize(("folder", "lines"), [("launch", 20), ("gr/programs", 110)])
def test_programs_are_short(folder, lines):
    """A program parses its arguments, calls the library and prints; one in launch/ starts it."""
    counted = {p.name: len(p.read_text().splitlines()) for p in (ROOT / folder).glob("*.py")}
    long = {name: n for name, n in counted.items() if n > lines}
    assert not long, f"programs in {folder}/ of more than {lines} lines: move code into gr/: {long}"


TABLES = {name: table for name, table in vars(registry).items() if name.isupper() and isinstance(table, dict)}
COMPONENTS = ("ENCODERS", "SPLITS", "INGEST", "TASKS", "OBJECTIVES", "OPTIMIZERS", "VOCABULARIES")


@pytest.mark.parametrize(("table", "name"), [(t, n) for t, entries in TABLES.items() for n in entries])
def test_every_registered_name_resolves(table, name):
    entry = registry.resolve(TABLES[table], name, table.lower())
    assert isinstance(entry, type)
    if table in COMPONENTS:
        assert issubclass(entry.Config, ComponentConfig) and entry.Config.component() is entry
        assert entry.Config.model_fields["name"].default == name or name in str(
            entry.Config.model_fields["name"]
        )
    elif table == "DATASETS":
        assert issubclass(entry.Options, Section) and entry.name == name


def test_tables_of_names_are_known_here():
    assert {
        "ENCODERS",
        "SPLITS",
        "TASKS",
        "OBJECTIVES",
        "BASELINES",
        "OPTIMIZERS",
        "DATASETS",
        "INGEST",
    } <= set(TABLES)


# Hosts of package registries and paths of somebody's machine. Spelt apart, so that this file passes its own test.
_FORBIDDEN = re.compile(
    "|".join(
        [
            r"pypi\." + r"org",
            r"pytho" + r"nhosted",
            r"download\.pyt" + r"orch\.org",
            r"conda\.ana" + r"conda",
            r"pypi\.nvi" + r"dia",
            r"(?<![\w.])/(wo" + r"rk|ho" + r"me|ro" + r"ot|Us" + r"ers)/\w",
            r"/tmp/te" + r"am",
        ]
    )
)


def test_no_registry_hosts_and_no_paths_of_a_machine():
    found = []
    for file in tracked_files():
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue  # pictures
        for number, line in enumerate(text.splitlines(), 1):
            if match := _FORBIDDEN.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found, "\n".join(found)


def test_the_policy_sees_what_it_forbids(tmp_path):
    # The checks above must be able to fail.
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gr.train\n"
        "def f():\n    from gr.models import hstu\n    from . import order\n    from ..batch import SequenceBatch\n"
    )
    names = {name for name, _ in imported_modules(file, "gr.data")}
    assert {"gr.models", "gr.models.hstu", "gr.data.order", "gr.batch.SequenceBatch"} <= names
    assert "gr.train" not in names
    assert part_of("gr.models.hstu") not in MAY_IMPORT["gr.data"]
    file.write_text(
        '"""Reads launch/x.py and configs/."""\nfrom pathlib import Path\nA = Path(__file__).parents[1]\n'
        "def f():\n    # configs/ in a comment\n    'launch/ in a docstring'\n    return A / 'configs/x.yaml'\n"
        "B = Path(__file__).parent.parent\nC = 'the configs/ folder'\nD = 'gr/configs/x'\n"
    )
    assert [line.partition(" ")[0] for line in ways_out(file)] == ["A", "return", "B", "C"]
    assert _FORBIDDEN.search("see " + "/ho" + "me/me/file") and not _FORBIDDEN.search("a path/ho" + "me/x")
