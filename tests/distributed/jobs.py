"""Several runs in one job: starting processes takes longer than a tiny run.

    torchrun --nproc-per-node N jobs.py FILE

FILE: JSON, a list of {"config": path, "overrides": [...]} or {"resume": run's folder, "overrides": [...]}; with
"broken_at": STEP, that step's gradients are not numbers, though its loss is one.  A run that is refused leaves the
sentence of each rank in FILE.N.RANK.json (a list as long as FILE's, null where all went well).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_jobs(folder: Path, jobs: list[dict], processes: int, timeout: int = 300) -> list[list[str | None]]:
    """Run ``jobs`` on so many processes; what refused each, rank by rank."""
    file = folder / f"jobs-{processes}.json"
    file.write_text(json.dumps(jobs, default=str))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, str(file)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    ranks = [json.loads(Path(f"{file}.{processes}.{rank}.json").read_text()) for rank in range(processes)]
    return [list(of_job) for of_job in zip(*ranks, strict=True)]


@contextmanager
def breaking(step: int | None) -> Iterator[None]:
    """The gradients of step number ``step`` (one micro-batch each) are NaN: those of sqrt |w - w|, which is 0."""
    from gr.models.retrieval import Retrieval

    real, calls = Retrieval.forward, 0

    def forward(self, part, context):
        nonlocal calls
        calls += 1
        loss = real(self, part, context)
        if calls != step:
            return loss
        weight = self.input.positions
        return loss + (weight - weight.detach()).abs().sqrt().sum()

    Retrieval.forward = forward if step is not None else real
    try:
        yield
    finally:
        Retrieval.forward = real


def main(file: str) -> None:
    import torch.distributed as dist

    from gr import config as configs
    from gr.errors import UserError
    from gr.train import job

    job.plot_run = lambda folder, shown: None  # pictures take longer than runs
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    refusals: list[str | None] = []
    for asked in json.loads(Path(file).read_text()):
        overrides, refusal = asked.get("overrides", []), None
        try:
            with breaking(asked.get("broken_at")):
                if "resume" in asked:
                    job.resume(asked["resume"], overrides)
                else:
                    job.run(configs.load(asked["config"], overrides))
        except UserError as error:
            refusal = str(error)
        refusals.append(refusal)
    Path(f"{file}.{ranks}.{rank}.json").write_text(json.dumps(refusals))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
