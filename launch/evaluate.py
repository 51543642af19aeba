"""Evaluate a trained run on a held-out split: every user once, the metrics of its model beside those of baselines.

The program is gr/programs/evaluate.py: `python -m gr evaluate` is the same.
"""

from gr.programs.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
