"""Plan a training on paper: memory, exchanges, time and cost on a cluster that need not be there.

python -m gr plan --config scale/hstu-1.5t --nodes 64 --gpus-per-node 8 --hbm-gib 141
python -m gr plan --config scale/hstu-1.5t --nodes 32,64,128 --zero 0,1,3 --batch 4096,8192 --tokens 1e12 --price 2.5
python -m gr plan --config ml-1m/hstu --nodes 1 --gpus-per-node 2 model.table=torchrec --json plan.json --plot plan

Nothing is allocated and no GPU is needed.  Batches are those of the dataset (data.path) or, where there is none, as
data.expected or --lengths describe them.  Several values for one option give a plan for each, best first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gr import config as configs
from gr.data.outputs import output_folder
from gr.errors import UserError, nearest, program
from gr.programs._arguments import names, new_parser, refuse_torchrun

SHARDINGS = ("row_wise", "table_wise", "column_wise", "auto")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a run's config, or the name of one that ships")
    add("overrides", nargs="*", metavar="key.key=value", help="changes to the config")
    add("--nodes", default="1", metavar="N,N", help="machines (default: 1)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="devices of a machine (default: 8)")
    add("--gpu", default="h200", metavar="NAME", help="a100, h100, h200 (default), b200; cpu")
    add("--hbm-gib", type=float, metavar="GIB", help="memory of a device (default: its data sheet's)")
    add("--machine", action="append", default=[], metavar="KEY=VALUE", help="another figure of the machine")
    add("--lengths", metavar="N,N", help="sequences' lengths: evenly spaced quantiles, shortest to longest")
    add("--sharding", metavar="S,S", help=f"of sharded tables: {', '.join(SHARDINGS)}")
    add("--zero", metavar="N,N", help="ZeRO stages of the dense part; 0 is train.engine=ddp")
    add("--batch", metavar="N,N", help="train.global_batch")
    add("--tokens", type=float, metavar="N", help="what a training on so many tokens takes")
    add("--price", type=float, metavar="P", help="of an hour of a device")
    add("--json", type=Path, metavar="FILE", help="write the plans there")
    add("--plot", type=Path, metavar="FILE", help="draw them there (.png and .svg)")
    return parser.parse_intermixed_args(arguments)


def numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    found = names(text)
    if not found or not all(word.isdecimal() for word in found):
        raise UserError(f"{option} {text}: give whole numbers with commas between, as in 8,16")
    return [int(word) for word in found]


@program
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    refuse_torchrun("plan, which needs none of the processes that it plans for,", "with --nodes N")
    nodes, zero = numbers("--nodes", options.nodes), numbers("--zero", options.zero)
    lengths, batch = numbers("--lengths", options.lengths), numbers("--batch", options.batch)
    if not nodes or min(nodes) < 1 or options.gpus_per_node < 1:
        raise UserError("--nodes and --gpus-per-node are 1 or more")
    if zero and max(zero) > 3:
        raise UserError(f"--zero {options.zero}: stages are 0 to 3")
    if lengths and min(lengths) < 1:
        raise UserError(f"--lengths {options.lengths}: a sequence has an action at least")
    for option in ("hbm_gib", "tokens", "price"):
        if (given := getattr(options, option)) is not None and not 0 < given < float("inf"):
            raise UserError(f"--{option.replace('_', '-')} {given}: give a number above 0")
    shardings = None if options.sharding is None else names(options.sharding)
    if shardings is not None and (not shardings or not set(shardings) <= set(SHARDINGS)):
        strange = next((word for word in shardings if word not in SHARDINGS), "")
        raise UserError(f"--sharding '{options.sharding}': {nearest(strange, SHARDINGS)}")
    for file in filter(None, (options.json, options.plot)):
        if file.is_dir():
            raise UserError(f"'{file}' is a folder: give the name of a file to write")
        output_folder(file)
    config = configs.load(options.config, options.overrides)

    from rich.console import Console

    from gr.scaling.machine import cpu, gpu
    from gr.scaling.plan_report import report
    from gr.train.planning import plan_run

    if options.gpu == "cpu":  # machines like this one, so many processes on each
        machine = cpu(options.gpus_per_node)
    else:
        machine = gpu(options.gpu, options.hbm_gib, options.gpus_per_node)
    machine = machine.changed(options.machine)
    given = {"sharding": shardings, "zero": zero, "batch": batch}
    varied: dict[str, Sequence[Any]] = {
        name: list(dict.fromkeys(values)) for name, values in given.items() if values
    }

    def say(sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)

    plans = plan_run(config, machine, list(dict.fromkeys(nodes)), varied, lengths, say)
    report(plans, options.tokens, options.price, options.json, options.plot, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
