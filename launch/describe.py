"""Print what is in a sequence dataset: counts, lengths, popularity, times, samples, health.

The program is gr/programs/describe.py: `python -m gr describe` is the same.
"""

from gr.programs.describe import main

if __name__ == "__main__":
    raise SystemExit(main())
