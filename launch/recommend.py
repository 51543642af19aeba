"""Write the best items of each user, by a trained run, to a Parquet file.

The program is gr/programs/recommend.py: `python -m gr recommend` is the same.
"""

from gr.programs.recommend import main

if __name__ == "__main__":
    raise SystemExit(main())
