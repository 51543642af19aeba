"""What a run ran on: the content of its environment.json.

Versions, devices and the command line; no host name, no user, no environment variables, no credentials.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from gr.launcher import attempt

PACKAGES = (
    "torch",
    "numpy",
    "pyarrow",
    "fsspec",
    "pydantic",
    "triton",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "deepspeed",
    "ray",
    "transformers",
)
_SECRET_WORDS = ("password", "passwd", "secret", "token", "credential", "api_key", "apikey", "access_key")


def record() -> dict[str, Any]:
    """The environment as a JSON-able dict: versions (None: not installed), code, cpu, gpus, threads, argv; job: the
    launcher's, which knows the run by it when it is started again."""
    import torch

    import gr

    return {
        "gr": gr.__version__,
        "code": code_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: installed_version(name) for name in PACKAGES},
        "operators": operators(),
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "memory_gib": memory_gib(),
            "torch_threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": torch.version.cuda,
        "gpus": gpus(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "job": attempt().job,
        "argv": without_credentials(sys.argv),
    }


@cache  # reading it takes milliseconds, and a process may hold many runs
def installed_version(name: str) -> str | None:
    """The version of an installed distribution; None where there is none of that name."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def operators() -> str:
    """``compiled``, or why gr_kernels' C++ operators aren't there."""
    try:
        from gr_kernels import native
    except ImportError as error:
        return f"gr_kernels can't be imported: {error}"
    return native.why_unavailable() or "compiled"


def missing_operators(device: str) -> str | None:
    """One line for the beginning of a run on ``device`` (cpu, cuda) that would be slower than it could be, because the
    C++ operators are missing or broken; None where they are there, or where the run doesn't need them."""
    found = operators()
    if device != "cpu" or found == "compiled":
        return None
    return (
        f"the C++ operators are not used ({found}): training on CPU is slower without; "
        "python -m gr doctor names the fix"
    )


def code_version() -> str | None:
    """The commit of the checkout whose files this package's are, ``+changes`` when files differ from it; None
    elsewhere, as where a wheel is installed into an environment inside somebody's checkout."""
    import gr

    package = Path(gr.__file__).parent
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def cpu_model() -> str:
    """What the processor calls itself, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on: the affinity mask, where the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Physical memory in GiB."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def gpus() -> list[dict[str, Any]]:
    """Name, memory (GiB) and compute capability of every CUDA device that is visible."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": device.name,
                "memory_gib": round(device.total_memory / 2**30, 1),
                "capability": f"{device.major}.{device.minor}",
            }
        )
    return found


def without_credentials(arguments: list[str]) -> list[str]:
    """Command-line arguments without the user part and the query of URLs, and without the values of options whose
    name sounds like a secret (``--token X``, ``my_token=X``)."""
    clean: list[str] = []
    hide = False
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if hide:
            clean.append("<hidden>")
        elif separator and "://" not in key:
            clean.append(f"{key}={'<hidden>' if _sounds_secret(key) else _clean_url(value)}")
        else:
            clean.append(_clean_url(argument))
        hide = not separator and argument.startswith("-") and _sounds_secret(argument)
    return clean


def _sounds_secret(key: str) -> bool:
    return any(word in key.lower().replace("-", "_") for word in _SECRET_WORDS)


def _clean_url(text: str) -> str:
    if "://" not in text:
        return text
    url = urlsplit(text)
    return urlunsplit(
        (url.scheme, url.netloc.rpartition("@")[2], url.path, "<hidden>" if url.query else "", "")
    )
