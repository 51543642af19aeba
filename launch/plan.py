"""Plan a training on paper: memory, exchanges, time and cost on a cluster that need not be there.

The program is gr/programs/plan.py: `python -m gr plan` is the same.
"""

from gr.programs.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
