"""Looks at the machine and the environment: what is there, what doesn't fit together, the command that mends it.

Imports nothing but the standard library until a check asks for more, so that it works where packages are missing or
broken: that is what it is for.  The program ``doctor`` prints its findings.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "absent", "warning", "broken"]

REQUIRED = {  # distribution: module
    "numpy": "numpy",
    "pyarrow": "pyarrow",
    "fsspec": "fsspec",
    "pydantic": "pydantic",
    "PyYAML": "yaml",
    "safetensors": "safetensors",
    "rich": "rich",
    "matplotlib": "matplotlib",
}
OPTIONAL = {
    "deepspeed": "deepspeed",
    "ray": "ray",
    "transformers": "transformers",
    "tensorboard": "tensorboard",
}
OLDEST_TORCH = ">=2.11"
TESTED_SET = Path(__file__).with_name("tested_set.txt")
"""Versions gr is tested with, as constraints for pip."""
_EXTRAS = {"transformers": "encoders"}  # where the extra isn't named like the package


@dataclass(frozen=True)
class Finding:
    """One line of the report.  ``absent``: optional and not there; ``fix``: a command or a sentence, "" if none."""

    what: str
    state: State
    detail: str
    fix: str = ""


def examine(tested: Mapping[str, str]) -> list[Finding]:
    """All findings; ``tested`` maps packages to the version constraint they are tested with.

    A check that fails in a way nobody foresaw is a finding too, never an exception.
    """
    findings: list[Finding] = []
    for check in (
        _python,
        _torch,
        _devices,
        _threads,
        _compiler,
        _packages,
        _gr,
        _operators,
        _triton,
        _sharded,
        _apex,
    ):
        try:
            findings.extend(check(tested))
        except Exception as error:
            findings.append(
                Finding(check.__name__.strip("_"), "broken", f"the check failed: {_one_line(error)}")
            )
    return findings


def tested_set(file: Path) -> dict[str, str]:
    """Package -> constraint, from a file of lines like ``torch==2.13.0``; empty if the file isn't there."""
    if not file.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    matches = (re.fullmatch(r"([\w.-]+?)([=<>!~].*)", line) for line in lines if line)
    return {m[1]: m[2] for m in matches if m}


def satisfies(version: str, constraint: str) -> bool:
    """Whether ``2.13.0+cpu`` satisfies ``>=2.11,<2.14`` (releases only: local and pre-release parts are ignored)."""
    have = _release(version)
    for part in constraint.split(","):
        match = re.fullmatch(r"\s*(==|>=|<=|!=|<|>)\s*([\d.]+?)(\.\*)?\s*", part)
        if match is None:
            raise ValueError(f"version constraint '{part}' is not understood")
        want = _release(match[2])
        width = len(want) if match[3] else max(len(have), len(want))
        mine, theirs = (x[:width] + (0,) * (width - len(x)) for x in (have, want))
        holds = {
            "==": mine == theirs,
            "!=": mine != theirs,
            ">=": mine >= theirs,
            "<=": mine <= theirs,
            "<": mine < theirs,
            ">": mine > theirs,
        }
        if not holds[match[1]]:
            return False
    return True


def report(findings: list[Finding]) -> str:
    """The findings as a table (plain lines where rich is missing), and a closing sentence."""
    broken, warnings = (sum(f.state == state for f in findings) for state in ("broken", "warning"))
    closing = (
        f"{broken} broken, {warnings} worth a look" if broken or warnings else "Everything fits together."
    )
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [
            f"{f.state:8} {f.what:16} {f.detail}" + (f"\n{'':25} fix: {f.fix}" if f.fix else "")
            for f in findings
        ]
        return "\n".join([*lines, closing])
    colours = {"ok": "green", "absent": "dim", "warning": "yellow", "broken": "bold red"}
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "fix"):
        table.add_column(column, overflow="fold")
    for f in findings:
        table.add_row(f"[{colours[f.state]}]{f.state}[/]", f.what, _plain(f.detail), _plain(f.fix))
    console = Console(width=shutil.get_terminal_size((120, 24)).columns)
    with console.capture() as captured:
        console.print(table)
    return captured.get() + closing


def _python(tested: Mapping[str, str]) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    fix = "" if fits else "make setup VENV=.venv-312 PYTHON=python3.12 (or python3.11)"
    yield Finding("python", "ok" if fits else "broken", f"{version} ({sys.executable})", fix)


def _torch(tested: Mapping[str, str]) -> Iterator[Finding]:
    torch, why = _import("torch")
    if torch is None:
        yield Finding("torch", "broken", why, "make setup")
        return
    constraint = tested.get("torch", OLDEST_TORCH)
    if not satisfies(torch.__version__, OLDEST_TORCH):
        yield Finding(
            "torch", "broken", f"{torch.__version__} is older than 2.11", _pip(f"'torch{constraint}'")
        )
    elif not satisfies(torch.__version__, constraint):
        detail = f"{torch.__version__}; tested with {constraint.lstrip('=')}"
        yield Finding("torch", "warning", detail, _pip(f"'torch{constraint}'"))
    else:
        yield Finding("torch", "ok", torch.__version__)
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        yield Finding(
            "distributed", "warning", "this torch has no gloo: one process only", "install an official torch"
        )


def _devices(tested: Mapping[str, str]) -> Iterator[Finding]:
    torch, _ = _import("torch")
    if torch is None:
        return
    seen = nvidia_gpu_seen()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            detail = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
            yield Finding(f"gpu {index}", "ok", f"{detail}, CUDA {torch.version.cuda}")
        if not torch.distributed.is_nccl_available():
            yield Finding(
                "nccl", "warning", "this torch has no NCCL: several GPUs will go through gloo, slowly"
            )
    elif seen and torch.version.cuda is None:
        fix = "rm -f .venv/.torch && make setup DEVICE=cuda"
        yield Finding("gpu", "warning", "the machine has an NVIDIA GPU, torch is the CPU build", fix)
    elif seen:
        detail = f"the machine has an NVIDIA GPU, torch (CUDA {torch.version.cuda}) can't use it"
        yield Finding(
            "gpu", "broken", detail, "update the NVIDIA driver (nvidia-smi shows the newest CUDA it knows)"
        )
    else:
        detail = "none; training runs on CPU" + (
            " (torch is the CUDA build: larger, not wrong)" if torch.version.cuda else ""
        )
        yield Finding("gpu", "absent", detail)


def nvidia_gpu_seen() -> bool:
    """Whether the machine shows an NVIDIA GPU, asked without torch."""
    if os.path.exists("/dev/nvidia0"):
        return True
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _threads(tested: Mapping[str, str]) -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch, _ = _import("torch")
    if torch is None:
        yield Finding("cpu", "ok", f"{usable} usable cores")
        return
    threads = torch.get_num_threads()
    detail = f"{usable} usable cores, {threads} torch threads, {torch.backends.cpu.get_cpu_capability()}"
    if threads > usable:
        fix = f"export OMP_NUM_THREADS={usable}, or set train.threads={usable}"
        yield Finding("cpu", "warning", f"{detail}: more threads than cores", fix)
    else:
        yield Finding("cpu", "ok", detail)


def _compiler(tested: Mapping[str, str]) -> Iterator[Finding]:
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        fix = "install one (Debian: apt-get install g++), then: rm -f .venv/.kernels && make setup"
        yield Finding("c++ compiler", "warning", "none: the C++ operators can't be built", fix)
        return
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20)
    yield Finding("c++ compiler", "ok", f"{compiler}: {(done.stdout.splitlines() or ['?'])[0]}")


def _packages(tested: Mapping[str, str]) -> Iterator[Finding]:
    for name, module in REQUIRED.items():
        found, why = _import(module)
        yield (
            Finding(name, "broken", why, _pip(name))
            if found is None
            else Finding(name, "ok", _version(name) or "?")
        )
    for name, module in OPTIONAL.items():
        version = _version(name)
        fix = "make setup-sharded" if name == "deepspeed" else _pip(_extra(_EXTRAS.get(name, name)))
        if version is None:
            yield Finding(name, "absent", "optional", fix)
            continue
        found, why = _import(module)
        if found is None:
            yield Finding(name, "broken", why, fix)
        elif name in tested and not satisfies(version, tested[name]):
            yield Finding(name, "warning", f"{version}; tested with {tested[name].lstrip('=')}", fix)
        else:
            yield Finding(name, "ok", version)


def _extra(name: str) -> str:
    """What pip is to install for one of gr's extras, wherever gr is: its own list where it is installed."""
    try:
        needs = metadata.requires("gr") or []
    except metadata.PackageNotFoundError:
        needs = []
    marked = (need.partition(";") for need in needs)
    wanted = [need.strip() for need, _, marker in marked if re.search(rf"extra == ['\"]{name}['\"]", marker)]
    return " ".join(f"'{need}'" for need in wanted) or f"-e '.[{name}]'"


def _gr(tested: Mapping[str, str]) -> Iterator[Finding]:
    import gr

    where = Path(gr.__file__).parent
    if _version("gr") is None:
        yield Finding("gr", "warning", f"{gr.__version__}, not installed (found in {where})", "make setup")
    elif _version("gr") != gr.__version__:
        detail = f"{gr.__version__} in {where}, but {_version('gr')} is installed"
        yield Finding("gr", "warning", detail, _pip("-e .", "--no-build-isolation --no-deps"))
    else:
        yield Finding("gr", "ok", f"{gr.__version__} ({where})")


def _operators(tested: Mapping[str, str]) -> Iterator[Finding]:
    fix = _pip("-e ./kernels", "--no-build-isolation --no-deps --force-reinstall")
    package, why = _import("gr_kernels")
    if package is None:
        yield Finding("gr_kernels", "broken", why, fix)
        return
    if _import("torch")[0] is None:
        yield Finding("gr_kernels", "broken", "needs torch, which is missing or broken", "make setup")
        return
    native, why = _import("gr_kernels.native")
    missing = why if native is None else native.why_unavailable()
    if missing:
        yield Finding("gr_kernels", "warning", f"without C++ operators, slower on CPU: {missing}", fix)
    else:
        yield Finding(
            "gr_kernels", "ok", f"{_version('gr-kernels') or 'not installed'}, C++ operators compiled"
        )


def _triton(tested: Mapping[str, str]) -> Iterator[Finding]:
    version = _version("triton")
    torch, _ = _import("torch")
    on_gpu = torch is not None and torch.cuda.is_available()
    wanted = _needed_by_torch("triton")
    fix = _pip(f"'triton{wanted or tested.get('triton', '')}'")
    if version is None:
        state: State = "warning" if on_gpu else "absent"
        yield Finding(
            "triton",
            state,
            "absent: GPU kernels need it" if on_gpu else "only GPU kernels need it",
            fix if on_gpu else "",
        )
    elif wanted and not satisfies(version, wanted):
        yield Finding(
            "triton", "broken", f"{version}, but the installed torch needs {wanted.lstrip('=')}", fix
        )
    else:
        yield Finding("triton", "ok", version)


def _needed_by_torch(name: str) -> str:
    """The installed torch's own constraint on a package ("" if it has none)."""
    try:
        needs = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return ""
    for need in needs:
        match = re.match(rf"{re.escape(name)}\s*\(?([=<>!~][^;)]*)", need)
        if match:
            return match[1].strip()
    return ""


def _sharded(tested: Mapping[str, str]) -> Iterator[Finding]:
    torch, _ = _import("torch")
    versions = {name: _version(name) for name in ("torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")}
    if not any(versions.values()):
        yield Finding("torchrec", "absent", "optional: tables sharded over devices", "make setup-sharded")
        return
    cuda = torch is not None and torch.version.cuda is not None
    right, wrong = ("fbgemm-gpu", "fbgemm-gpu-cpu") if cuda else ("fbgemm-gpu-cpu", "fbgemm-gpu")
    build = "CUDA" if cuda else "CPU"
    reinstall = _pip(f"{right}{tested.get(right, '')}", "--no-deps --force-reinstall")
    if versions[wrong]:
        detail = f"{wrong} {versions[wrong]} is installed, torch is the {build} build" + (
            f"; {right} is there too, and both write the same files" if versions[right] else ""
        )
        yield Finding(
            "fbgemm", "broken", detail, f"{_python_command()} -m pip uninstall -y {wrong} && {reinstall}"
        )
    elif not versions[right]:
        yield Finding("fbgemm", "broken", f"torchrec is installed, {right} isn't", reinstall)
    for name, module, fix in (
        (right, "fbgemm_gpu", reinstall),
        ("torchrec", "torchrec", _pip(f"torchrec{tested.get('torchrec', '')}", "--no-deps")),
    ):
        version = versions[name]
        if version is None:
            if name == "torchrec":
                yield Finding(name, "broken", "fbgemm is installed, torchrec isn't", "make setup-sharded")
            continue
        if name in tested and not satisfies(version, tested[name]):
            partner = tested.get("torch", "").lstrip("=")
            detail = f"{version}; {tested[name].lstrip('=')} is the one that fits torch {partner}"
            yield Finding(name, "broken", detail, fix)
            continue
        found, why = _import(module)
        yield Finding(name, "broken", why, fix) if found is None else Finding(name, "ok", version)


def _apex(tested: Mapping[str, str]) -> Iterator[Finding]:
    if importlib.util.find_spec("apex") is None:
        return  # nothing is lost: torch's fused optimisers are used
    found, why = _import("apex.optimizers")
    if found is not None and hasattr(found, "FusedAdam"):
        yield Finding("apex", "ok", "NVIDIA's")
        return
    remove = f"{_python_command()} -m pip uninstall -y apex"
    yield Finding(
        "apex", "broken", f"not NVIDIA's (the package index's apex is another project) {why}".strip(), remove
    )


def _import(module: str) -> tuple[Any, str]:
    """The module, or None and why it can't be imported (a broken binary raises more than ImportError)."""
    try:
        return importlib.import_module(module), ""
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            return None, "not installed"
        return None, _one_line(error)
    except Exception as error:
        return None, f"doesn't import: {_one_line(error)}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _python_command() -> str:
    """This interpreter, as short as it can be typed in the current folder."""
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith("..") else relative


def _pip(what: str, flags: str = "") -> str:
    return " ".join(filter(None, [_python_command(), "-m pip install", flags, what]))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _plain(text: str) -> str:
    return text.replace("[", "\\[")  # rich's markup
