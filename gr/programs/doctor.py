"""Says what this machine and environment have, what doesn't fit together, and the command that mends it.

python -m gr doctor        exit status 1 when something is broken, 0 otherwise (warnings included)
"""

from __future__ import annotations

import sys

from gr import doctor
from gr.programs._arguments import new_parser


def main(arguments: list[str] | None = None) -> int:
    new_parser(__doc__).parse_args(arguments)
    findings = doctor.examine(doctor.tested_set(doctor.TESTED_SET))
    print(doctor.report(findings))
    return 1 if any(f.state == "broken" for f in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
