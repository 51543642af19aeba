"""A sweep from its file to its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gr.data.dataset import SequenceDataset
from gr.data.outputs import output_folder
from gr.errors import UserError
from gr.progress import default_progress
from gr.train.evaluation import Evaluation
from gr.train.parts import open_data
from gr.train.sweep import report
from gr.train.sweep.backends.base import Resources, opened
from gr.train.sweep.figures import draw
from gr.train.sweep.plan import SweepConfig, members_of, read_sweep
from gr.train.sweep.results import laws_of, row_of, save
from gr.train.sweep.run import Outcome, train_members


def sweep(
    config: str | Path,
    out: str | Path,
    workers: int = 1,
    overrides: Sequence[str] = (),
    backend: str = "local",
    resources: Resources = Resources(),
) -> bool:
    """Train the members of the sweep ``config``, fit its laws, write the report into the folder ``out``; whether every
    member finished.  Started again, it does what is left.  backend, resources: gr.train.sweep.backends."""
    if workers < 1:
        raise UserError(f"{workers} members at a time: one is the least")
    plan, file = read_sweep(config)
    if (out := output_folder(out)).is_file():
        raise UserError(f"'{out}' is a file: give a folder for the members and the report")
    with opened(backend, resources) as at:
        members, left_out = members_of(plan, file, out, _data(plan, out), overrides)
        for sentence in left_out:
            print(sentence, flush=True)
        print(f"{len(members)} members in {out / 'members'}, {workers} at a time", flush=True)
        outcomes = train_members(members, out, workers, at)
    rows = [row_of(outcome, plan) for outcome in outcomes]
    laws = laws_of(plan, rows, _floor(plan, outcomes))
    report.show(plan, rows, laws)
    save(plan, rows, laws, left_out, out / "results.json")
    pictures = draw(plan, rows, laws, out)
    page = report.page(plan, rows, laws, pictures, out, file.stem)
    print(f"report {page}; numbers {out / 'results.json'}")
    return not any(row.why for row in rows)


def _floor(plan: SweepConfig, outcomes: Sequence[Outcome]) -> float | None:
    """What of the loss is known to be irreducible: a number of the file's, or the loss of the best possible scorer on
    the test split that the members were judged by."""
    if plan.fit.floor != "oracle":
        return plan.fit.floor
    trained = next((outcome.trained for outcome in outcomes if outcome.trained), None)
    if trained is None:
        return None
    data = open_data(trained.config)
    evaluation = Evaluation(data.dataset, data.split, trained.config, data.catalogue)
    return evaluation.run("test", evaluation.baseline("oracle")).metrics["loss"]


def _data(plan: SweepConfig, out: Path) -> str | None:
    """The generated dataset, made unless it is there; None where the members say where theirs is."""
    if plan.dataset is None:
        return None
    from gr.data.making.sources.base import make_source

    path, source = out / "data", make_source(plan.dataset, plan.options)
    if (path / "manifest.json").is_file():
        provenance = SequenceDataset(path).manifest.provenance
        made = {"dataset": provenance.get("source"), **provenance.get("options", {})}
        # what isn't said has its default
        asked = {"dataset": plan.dataset, **source.options.model_dump(mode="json")}
        for key, value in asked.items():
            if key in made and made[key] != value:
                raise UserError(
                    f"'{path}' was made with {key}={made[key]}, and the sweep asks for {value}: choose another "
                    "--out, or move that folder away"
                )
        return str(path)
    if path.exists():
        raise UserError(
            f"'{path}' is there and holds no dataset (manifest.json is missing): move it away, or choose another --out"
        )
    source.prepare(None, str(path), progress=default_progress())
    return str(path)
