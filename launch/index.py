"""Write the item heads of a pre-ranking run (IntTower), and measure what a search in front of exact scores finds.

The program is gr/programs/index.py: `python -m gr index` is the same.
"""

from gr.programs.index import main

if __name__ == "__main__":
    raise SystemExit(main())
