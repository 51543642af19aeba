"""Evaluate a trained run on a held-out split: the whole catalogue ranked for every user.

python launch/evaluate.py --run runs/NAME --split test --baselines popularity,last_item --buckets
torchrun --standalone --nproc-per-node 2 launch/evaluate.py --run runs/NAME eval.exclude=all
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gr import config as configs
from gr.errors import UserError, program


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="a run's folder")
    parser.add_argument("--split", default="test", help="a held-out split: test (default) or valid")
    parser.add_argument(
        "--checkpoint", default="last", help="last (default), best (on valid) or a step number"
    )
    parser.add_argument(
        "--baselines", default="", metavar="A,B", help="popularity, last_item, item_knn, oracle"
    )
    parser.add_argument("--buckets", action="store_true", help="also by history length and item popularity")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument(
        "overrides", nargs="*", metavar="eval.key=value", help="changes to the run's eval section"
    )
    options = parser.parse_intermixed_args()
    if others := [o for o in options.overrides if not o.startswith("eval.")]:
        raise UserError(f"'{others[0]}' cannot change when evaluating: only eval.* can")
    return options


@program
def main() -> int:
    options = arguments()

    from rich.console import Console

    from gr.data.progress import Progress, default_progress
    from gr.eval.tables import buckets_tables, results_table
    from gr.train.evaluation import Evaluation
    from gr.train.folder import RunFolder
    from gr.train.parallel import processes
    from gr.train.runs import open_run

    overrides = [*options.overrides, f"eval.buckets={str(options.buckets).lower()}"]
    config = configs.override(configs.load(RunFolder.existing(options.run).config), overrides)
    results = {}
    with processes(config.train.device, config.train.threads) as parallel:
        run = open_run(options.run, options.checkpoint, parallel.device)
        evaluation = Evaluation(run.dataset, run.split, config, device=parallel.device)
        progress = default_progress() if parallel.is_main else Progress()
        model = config.model.encoder.name
        for name in [model, *filter(None, options.baselines.split(","))]:
            scorer = run.model if name == model else evaluation.baseline(name)
            with progress.stage(name, evaluation.requests(options.split).share, "users") as stage:
                results[name] = evaluation.run(options.split, scorer, advance=stage.advance)
    if parallel.is_main:
        console = Console()
        console.print(results_table(results, f"{options.run}, {options.split}, step {run.step:,}"))
        for table in buckets_tables(results[model], model):
            console.print(table)
        console.print(f"{results[model].users_per_second:,.0f} users/s", highlight=False)
    if options.json and parallel.is_main:
        rows = {name: {**r.row(), "buckets": r.buckets} for name, r in results.items()}
        content = {"run": options.run, "step": run.step, "epoch": run.epoch, "results": rows}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
