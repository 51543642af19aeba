"""Train a family of models at several computes, fit the law that they follow, and report it.

The program is gr/programs/sweep.py: `python -m gr sweep` is the same.
"""

from gr.programs.sweep import main

if __name__ == "__main__":
    raise SystemExit(main())
