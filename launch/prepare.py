"""Make a sequence dataset from an action log or a published data set.

The program is gr/programs/prepare.py: `python -m gr prepare` is the same.
"""

from gr.programs.prepare import main

if __name__ == "__main__":
    raise SystemExit(main())
