"""What the Triton kernels cost on sm_80 and sm_90, found by compiling them: no GPU is needed.

    python benchmarks/kernels/resources.py [--only FOLDER[.CASE] ...] [--all] [--record] [--jobs N]

compile_cases/ has a file of cases for every operator's folder.  Each is compiled to machine code in a process where
Triton does not interpret, and the table shows registers a thread, bytes of registers spilled to memory, shared
memory, and how many wgmma and mma.sync instructions its PTX has.  A case fails

    when it spills more than its budget,
    when it is hot and, on sm_90, has an mma.sync or no wgmma,
    when it isn't and lost the wgmma it is recorded with,
    when it needs more shared memory than the GPU has,
    when it needs over 10 % more registers or shared memory than recorded (by the same version of Triton), or
    when the record does not have it; so does the run when the record has a case that is gone.

`--record` writes the table to tests/kernels/resources.json; with `--only` the other rows stay.  Each row keeps the key
by which Triton would find the compiled kernel in a cache: of its source and all that it calls, the case's arguments and
options, Triton's own files and ptxas.  A case whose key is recorded would compile to what is recorded, so its row is
checked as it stands; `--all` compiles those, too.  A missing ptxas (Triton brings its own) ends the program with
status 3.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.kernels.arguments import positive  # noqa: E402

RECORD = ROOT / "tests" / "kernels" / "resources.json"
# Every folder of kernels/gr_kernels that has Triton kernels.
FOLDERS = (
    "bias_table_gradient",
    "counter_random",
    "fused_layer",
    "hstu_attention",
    "jagged",
    "log_partition",
    "sampled_softmax",
)
# What one block may have, in bytes: of 163 + 1 KiB on sm_80 (A100), of 227 KiB on sm_90.
SHARED_MEMORY = {80: 166_912, 90: 232_448}
SLACK = 1.1
NO_COMPILER = 3


@dataclass(frozen=True)
class Resources:
    """What one kernel needs: registers a thread, bytes spilled (stores + loads), bytes of shared memory a block,
    and its wgmma and mma.sync instructions."""

    registers: int
    spills: int
    shared: int
    wgmma: int
    mma_sync: int


@dataclass(frozen=True)
class Job:
    """Which case to compile for which compute capability; small enough to send to another process."""

    folder: str
    index: int
    architecture: int
    key: str
    hot: bool
    spill_budget: int

    @property
    def case(self) -> Any:
        return cases(self.folder)[self.index]


def cases(folder: str) -> list[Any]:
    """The CompileCases of an operator's folder."""
    if importlib.util.find_spec(f"benchmarks.kernels.compile_cases.{folder}") is None:
        raise SystemExit(
            f"benchmarks/kernels/compile_cases has no {folder}.py, and FOLDERS in {__file__} names it"
        )
    return importlib.import_module(f"benchmarks.kernels.compile_cases.{folder}").CASES


def selected(name: str, only: Sequence[str]) -> bool:
    """Whether a case of this name (folder.case, or with .sm_90) is among those asked for."""
    return not only or any(name == asked or name.startswith(f"{asked}.") for asked in only)


def jobs(only: Sequence[str]) -> list[Job]:
    """All cases on all their architectures; with ``only`` those whose folder or name starts so."""
    found = []
    for folder in FOLDERS:
        if only and folder not in {asked.split(".")[0] for asked in only}:
            continue
        for index, case in enumerate(cases(folder)):
            name = f"{folder}.{case.name}"
            if not selected(name, only):
                continue
            for architecture in case.architectures:
                key = f"{name}.sm_{architecture}"
                found.append(Job(folder, index, architecture, key, case.hot, case.spill_budget))
    names = [job.key for job in found]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise SystemExit(f"these compile cases share a name: {', '.join(sorted(repeated))}")
    return found


def source_of(case: Any) -> Any:
    """What Triton compiles for a CompileCase."""
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    forgotten = [n for n in names if signature[n] == "constexpr" and n not in case.constexprs]
    unknown = [n for n in (*case.signature, *case.constexprs) if n not in names]
    if forgotten or unknown:
        raise ValueError(f"compile case {case.name}: no value for {forgotten}, no such arguments: {unknown}")
    aligned = [
        n
        for n in names
        if n in case.signature
        and n not in case.unaligned
        and (signature[n].startswith("*") or n in case.divisible_by_16)
    ]
    return ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=dict(case.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def options_of(case: Any) -> dict[str, int]:
    return {"num_warps": case.num_warps, "num_stages": case.num_stages}


def key_of(case: Any, architecture: int) -> str:
    """Triton's key of the compiled kernel in its cache: equal keys, equal machine code."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import get_cache_key, make_backend

    backend = make_backend(GPUTarget("cuda", architecture, 32))
    options = backend.parse_options(options_of(case))
    key = get_cache_key(source_of(case), backend, options, env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()[:24]


def compile_case(case: Any, architecture: int) -> Resources:
    """Compiles a CompileCase for a compute capability (90 for sm_90) and reads what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget

    log = io.StringIO()
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a kernel out of the cache has no log
    with contextlib.redirect_stdout(log):
        target = GPUTarget("cuda", architecture, 32)
        kernel = triton.compile(source_of(case), target=target, options=options_of(case))
    ptx = kernel.asm["ptx"]
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    if not registers:
        raise RuntimeError(f"ptxas said nothing of registers for {case.name}: {log.getvalue()!r}")
    return Resources(
        registers=max(map(int, registers)),
        spills=sum(map(int, spilled)),
        shared=kernel.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma_sync=len(re.findall(r"\bmma\.sync", ptx)),
    )


def _begin() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _run(job: Job) -> Resources:
    return compile_case(job.case, job.architecture)


def compile_all(work: Sequence[Job], processes: int) -> list[Resources]:
    """Compiles the jobs in processes of their own, with a cache of kernels that is removed after."""
    if not work:
        return []
    with tempfile.TemporaryDirectory(prefix="gr-triton-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
            return list(pool.map(_run, work))


def gates(job: Job, found: Resources) -> list[str]:
    """What a kernel may never do, each in a few words."""
    faults = []
    if found.spills > job.spill_budget:
        faults.append(f"spills {found.spills} B, budget {job.spill_budget} B")
    if job.hot and job.architecture == 90 and (found.mma_sync or not found.wgmma):
        faults.append(f"{found.wgmma} wgmma and {found.mma_sync} mma.sync in a hot kernel")
    if found.shared > SHARED_MEMORY[job.architecture]:
        faults.append(f"{found.shared:,} B of shared memory, {SHARED_MEMORY[job.architecture]:,} B exist")
    return faults


def regressions(job: Job, found: Resources, record: dict[str, Any], version: str) -> list[str]:
    """What got worse since the record, each in a few words."""
    row = record["cases"].get(job.key)
    if row is None:
        return ["not in the record: run with --record"]
    before = recorded(row)
    faults = []
    if before.wgmma and not found.wgmma:
        faults.append("its products no longer are wgmma")
    if record["triton"] != version:
        return faults  # another compiler allots otherwise
    for what, slack in (("registers", SLACK), ("shared", SLACK), ("spills", 1)):
        now, then = getattr(found, what), getattr(before, what)
        if now > slack * then:
            faults.append(f"{what} {then:,} -> {now:,}")
    return faults


def unchanged(work: Sequence[Job], keys: Sequence[str], record: dict[str, Any]) -> dict[str, Resources]:
    """What compiles to the same as it did for the record, by name."""
    rows = {job.key: (key, record["cases"].get(job.key, {})) for job, key in zip(work, keys)}
    return {name: recorded(row) for name, (key, row) in rows.items() if row.get("compiled") == key}


def recorded(row: dict[str, Any]) -> Resources:
    """The resources in a row of the record."""
    return Resources(**{name: value for name, value in row.items() if name != "compiled"})


def show(work: Sequence[Job], found: Sequence[Resources], faults: Sequence[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Resources of the Triton kernels")
    table.add_column("kernel", overflow="fold")
    for heading in ("registers", "spills B", "shared B", "wgmma", "mma.sync"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for job, row, wrong in zip(work, found, faults):
        numbers = (f"{n:,}" for n in (row.registers, row.spills, row.shared, row.wgmma, row.mma_sync))
        table.add_row(job.key, *numbers, f"[red]{'; '.join(wrong)}" if wrong else "[green]ok")
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def save(
    work: Sequence[Job], found: Sequence[Resources], keys: Sequence[str], version: str, keep: dict[str, Any]
) -> None:
    rows = {
        **keep,
        **{job.key: asdict(row) | {"compiled": key} for job, row, key in zip(work, found, keys)},
    }
    RECORD.write_text(json.dumps({"triton": version, "cases": dict(sorted(rows.items()))}, indent=1) + "\n")
    print(f"recorded {len(rows)} kernels in {RECORD.relative_to(ROOT)}")


def missing_compiler() -> str:
    """Why nothing can be compiled here, in a sentence; "" when it can."""
    try:
        import triton
    except ImportError:
        return "triton isn't installed, so no kernel can be compiled: pip install triton"
    try:
        triton.knobs.nvidia.ptxas.path  # noqa: B018  (looks for it)
    except Exception:
        return "no ptxas was found: this build of triton doesn't bring it, set TRITON_PTXAS_PATH to one"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="an operator's folder, or FOLDER.CASE"
    )
    parser.add_argument(
        "--all", action="store_true", help="compile what hasn't changed since it was recorded, too"
    )
    parser.add_argument("--record", action="store_true", help="write the table as the one to compare with")
    parser.add_argument(
        "--jobs", type=positive(int), default=min(4, os.cpu_count() or 1), help="processes that compile"
    )
    arguments = parser.parse_args()
    _begin()
    if sentence := missing_compiler():
        print(sentence)
        return NO_COMPILER
    import triton

    work = jobs(arguments.only)
    if not work:
        print(f"no compile case is called {', '.join(arguments.only)}")
        return 2
    record = (
        json.loads(RECORD.read_text()) if RECORD.exists() else {"triton": triton.__version__, "cases": {}}
    )
    keys = [key_of(job.case, job.architecture) for job in work]
    known = {} if arguments.all else unchanged(work, keys, record)
    changed = [job for job in work if job.key not in known]
    known |= dict(zip((job.key for job in changed), compile_all(changed, arguments.jobs)))
    found = [known[job.key] for job in work]
    faults = [gates(job, row) for job, row in zip(work, found)]
    if not arguments.record:
        for job, row, wrong in zip(work, found, faults):
            wrong.extend(regressions(job, row, record, triton.__version__))
    show(work, found, faults)
    if arguments.record:
        others = {key: row for key, row in record["cases"].items() if not selected(key, arguments.only)}
        save(work, found, keys, triton.__version__, others)
    failed = sum(map(bool, faults))
    gone = [key for key in record["cases"] if selected(key, arguments.only)]
    gone = [] if arguments.record else sorted(set(gone) - {job.key for job in work})
    if gone:
        print(f"recorded, but no longer a case: {', '.join(gone)}; run with --record")
    print(f"{len(work)} kernels: {len(changed)} compiled, the others as recorded; {failed} failed")
    return 1 if failed or gone else 0


if __name__ == "__main__":
    sys.exit(main())
