"""Write the vectors that an encoder gives to the texts or pictures of a dataset's items, for training with
model.item_tower mode cached.

python -m gr encode --dataset data/ml-1m --tower towers/minilm
python -m gr encode --dataset data/ml-1m --tower towers/efficientnet-lite0
python -m gr encode --dataset data/ml-1m --tower my-encoder.yaml --items new.parquet --out new-vectors.parquet
"""

from __future__ import annotations

import sys

from gr.errors import program
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
    options = parser.parse_args(arguments)

    from gr.processes import processes
    from gr.train.encoding import encode, read_tower

    section = read_tower(options.tower)
    with processes(options.device, options.threads) as joined:
        file, count, width = encode(options.dataset, section, options.out, joined, options.items)
    if joined.is_main:
        print(f"wrote {count:,} vectors of {width} numbers to {file}")
        if options.items is None:
            print(f"next  model.item_tower={{name: text, mode: cached, vectors: {file}}}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
