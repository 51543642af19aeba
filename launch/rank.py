"""Score the candidates of requests, by a trained ranking run, and write their probabilities to a Parquet file.

The program is gr/programs/rank.py: `python -m gr rank` is the same.
"""

from gr.programs.rank import main

if __name__ == "__main__":
    raise SystemExit(main())
