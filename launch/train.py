"""Train a config, or go on with a run.

The program is gr/programs/train.py: `python -m gr train` is the same.
"""

from gr.programs.train import main

if __name__ == "__main__":
    raise SystemExit(main())
