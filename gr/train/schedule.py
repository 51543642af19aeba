"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from gr.config import ScheduleSection


def rate_factor(schedule: ScheduleSection, step: int, total_steps: int) -> float:
    """Factor on the learning rate for step ``step`` (from 0) of ``total_steps``."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    progress = (step - schedule.warmup_steps) / max(total_steps - schedule.warmup_steps, 1)
    progress = min(progress, 1.0)
    share = 1 - progress if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.final_fraction + (1 - schedule.final_fraction) * share
