"""A sweep from its file to its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gr.data.dataset import SequenceDataset
from gr.errors import UserError
from gr.progress import default_progress
from gr.train.sweep import report
from gr.train.sweep.plan import SweepConfig, members_of, read_sweep
from gr.train.sweep.results import laws_of, row_of, save
from gr.train.sweep.run import train_members


def sweep(config: str | Path, out: str | Path, workers: int = 1, overrides: Sequence[str] = ()) -> bool:
    """Train the members of the sweep ``config``, fit its laws, write the report into the folder ``out``; whether every
    member finished.  Started again, it does what is left."""
    if workers < 1:
        raise UserError(f"{workers} members at a time: one is the least")
    plan, file = read_sweep(config)
    out = Path(out)
    members, left_out = members_of(plan, file, out, _data(plan, out), overrides)
    for sentence in left_out:
        print(sentence, flush=True)
    print(f"{len(members)} members in {out / 'members'}, {workers} at a time", flush=True)
    outcomes = train_members(members, out, workers, lambda text: print(text, flush=True))
    rows = [row_of(outcome, plan.fit) for outcome in outcomes]
    laws = laws_of(plan, rows)
    report.show(plan, rows, laws)
    save(plan, rows, laws, left_out, out / "results.json")
    picture = report.plot(plan, rows, laws, out)
    page = report.page(plan, rows, laws, out, file.stem)
    print(f"report {page}; picture {picture or 'none'}; numbers {out / 'results.json'}")
    return not any(row.why for row in rows)


def _data(plan: SweepConfig, out: Path) -> str | None:
    """The generated dataset, made unless it is there; None where the members say where theirs is."""
    if plan.dataset is None:
        return None
    from gr.data.making.sources.base import make_source

    path = out / "data"
    if (path / "manifest.json").is_file():
        made = SequenceDataset(path).manifest.provenance.get("options", {})
        for key, value in plan.options.items():
            if made.get(key) != value:
                raise UserError(
                    f"'{path}' was made with {key}={made.get(key)}, and the sweep asks for {value}: choose another "
                    "--out, or move that folder away"
                )
        return str(path)
    make_source(plan.dataset, plan.options).prepare(None, str(path), progress=default_progress())
    return str(path)
