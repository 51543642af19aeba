"""The quickstart: makes a small Dirichlet-process stream and trains HSTU on it; a few minutes on two CPU cores.

python -m gr quickstart [key.key=value ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gr import config as configs
from gr.errors import program
from gr.programs._arguments import new_parser, refuse_torchrun

STREAM = {"records": 24_000, "items": 2_000, "categories": 20}


@program
def main(arguments: list[str] | None = None) -> int:
    started = time.perf_counter()
    parser = new_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="changes to the config")
    config = configs.load("quickstart", parser.parse_args(arguments).overrides)
    print(
        f"quickstart: {STREAM['records']:,} synthetic records of 128 actions, then HSTU on them", flush=True
    )
    prepare(config.data.path)

    import gr.train
    from gr.train.report import print_result

    result = gr.train.run(config)
    print_result(result)
    if not result.finished:
        return 0
    rows = {r.get("name", "hstu"): r for r in result.metrics if r["kind"] in ("baseline", "eval")}
    if all("hr@10" in rows.get(name, {}) for name in ("hstu", "popularity", "oracle")):
        hstu, popularity, oracle = (rows[name]["hr@10"] for name in ("hstu", "popularity", "oracle"))
        print(
            f"HSTU's HR@10 is {hstu / max(popularity, 1e-9):.1f} times popularity's and {hstu / oracle:.0%} of the "
            "oracle's, which knows the generator."
        )
    print(
        f"Took {time.perf_counter() - started:.0f} s.  Next: bring your own log (docs/your-own-data.md), or "
        "python -m gr reproduce ml-1m --source DIR"
    )
    return 0


def prepare(path: str) -> None:
    """Generate the stream unless it is there already."""
    if (Path(path) / "manifest.json").is_file():
        print(f"data: {path} is there already", flush=True)
        return
    refuse_torchrun("quickstart, which makes its data first,", "and with it when the data is there")

    from gr.data.making.sources.base import make_source
    from gr.progress import default_progress

    dataset = make_source("synthetic-dp", STREAM).prepare(None, path, progress=default_progress())
    print(f"data: {dataset.users:,} sequences, {dataset.items:,} items in {path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
