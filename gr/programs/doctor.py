"""Says what this machine and environment have, what doesn't fit together, and the command that mends it.

python -m gr doctor        exit status 1 when something is broken, 0 otherwise (warnings included)
torchrun ... -m gr.programs.doctor --cluster --config FILE [key.key=value ...]
                           of the processes that torchrun starts, on all hosts: whether packages, code, config, data and
                           run.dir are the same everywhere, and what each kind of exchange between them brings
"""

from __future__ import annotations

import sys

from gr import doctor
from gr.errors import UserError, program
from gr.launcher import end_with_agent
from gr.programs._arguments import new_parser


@program
def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--cluster", action="store_true", help="look at all processes that torchrun has started"
    )
    parser.add_argument("--config", metavar="FILE", help="with --cluster: what is to be trained")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="changes to the config")
    options = parser.parse_intermixed_args(arguments)
    if options.overrides and not options.config:
        raise UserError(
            f"'{options.overrides[0]}' changes a config, and there is none: say --config FILE, too"
        )
    if options.cluster:
        from gr import config as configs
        from gr.train.cluster_report import examine_cluster

        end_with_agent()
        return examine_cluster(configs.load(options.config, options.overrides) if options.config else None)
    if options.config:
        raise UserError("--config is looked at with --cluster: say that too, and start it with torchrun")
    findings = doctor.examine(doctor.tested_set(doctor.TESTED_SET))
    print(doctor.report(findings))
    return 1 if any(f.state == "broken" for f in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
