"""The quickstart: makes a small Dirichlet-process stream and trains HSTU on it; a few minutes on two CPU cores.

The program is gr/programs/quickstart.py: `python -m gr quickstart` is the same.
"""

from gr.programs.quickstart import main

if __name__ == "__main__":
    raise SystemExit(main())
