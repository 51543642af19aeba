"""Says what this machine and environment have, what doesn't fit together, and the command that mends it.

python launch/doctor.py        exit status 1 when something is broken, 0 otherwise (warnings included)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # the doctor also sees a checkout that isn't installed
    from gr import doctor

    findings = doctor.examine(doctor.tested_set(ROOT / "launch" / "tested_set.txt"))
    print(doctor.report(findings))
    return 1 if any(f.state == "broken" for f in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
