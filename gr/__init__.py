"""gr: training of generative recommenders, from action logs to evaluated models.

Importing this package imports nothing heavy; the parts are reached by their own names:
``gr.config`` (a run, typed), ``gr.data`` (logs -> sequences -> batches), ``gr.models``, ``gr.eval``,
``gr.train`` (``gr.train.run(config)`` is a whole run).
"""

__version__ = "0.1.0"
