"""Write the vectors that an encoder gives to the texts or pictures of a dataset's items, for training with
model.item_tower mode cached.

python -m gr encode --dataset data/ml-1m --tower towers/minilm
python -m gr encode --dataset data/ml-1m --tower towers/efficientnet-lite0
python -m gr encode --dataset data/ml-1m --tower my-encoder.yaml --items new.parquet --out new-vectors.parquet
"""

from __future__ import annotations

import sys
from datetime import timedelta

from gr.errors import UserError, program
from gr.launcher import end_with_agent
from gr.programs._arguments import new_parser


@program
def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="folder or URL of a sequence dataset")
    tower = "YAML file that says which encoder reads which columns, or the name of one that comes along"
    parser.add_argument("--tower", required=True, metavar="FILE", help=tower)
    items = "encode these items instead: Parquet with item_id and the columns that the encoder reads"
    parser.add_argument("--items", metavar="FILE", help=items)
    parser.add_argument(
        "--out", metavar="FILE", help="Parquet: item_id, vector (default: vectors.parquet in DATASET)"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="of this process (default: all cores)")
    timeout = "that a process may wait for another (default: %(default)s)"
    parser.add_argument("--timeout", type=int, default=600, metavar="SECONDS", help=timeout)
    options = parser.parse_args(arguments)
    if options.timeout < 1:
        raise UserError(f"--timeout is {options.timeout}: give it a second at least", everywhere=True)
    end_with_agent()

    from gr.processes import processes
    from gr.train.encoding import encode, read_tower
    from gr.train.watch import watching

    section = read_tower(options.tower)
    exchange = timedelta(seconds=options.timeout)
    with (
        processes(options.device, options.threads, timeout=exchange) as joined,
        watching(joined, "--timeout") as watch,
    ):
        watch.at("encoding", 0)
        file, count, width = encode(options.dataset, section, options.out, joined, options.items)
    if joined.is_main:
        print(f"wrote {count:,} vectors of {width} numbers to {file}")
        if options.items is None:
            name = "image" if hasattr(section, "images") else "text"
            print(f"next  model.item_tower={{name: {name}, mode: cached, vectors: {file}}}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
