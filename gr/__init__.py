"""gr: training of generative recommenders, from action logs to evaluated models.

Importing this package imports nothing heavy; the parts are reached by their own names:
``gr.config`` (a run, typed), ``gr.data`` (logs -> sequences -> batches), ``gr.models``, ``gr.eval``,
``gr.train`` (``gr.train.run(config)`` is a whole run).
"""

import os

# OpenMP's threads wait by spinning, by default for milliseconds: beside another busy program a step of two threads
# then takes several times as long.  A short spin costs nothing on a quiet machine.  Read when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
