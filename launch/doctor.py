"""Says what this machine and environment have, what doesn't fit together, and the command that mends it.

The program is gr/programs/doctor.py: `python -m gr doctor` is the same.  This one also sees a checkout that isn't
installed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from gr.programs.doctor import main

if __name__ == "__main__":
    raise SystemExit(main())
