"""Rebuild a published table: prepare, train every row, print published beside measured.

The program is gr/programs/reproduce.py: `python -m gr reproduce` is the same.
"""

from gr.programs.reproduce import main

if __name__ == "__main__":
    raise SystemExit(main())
