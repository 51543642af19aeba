"""What kind of targets an evaluation asks about: figures mean little without it.

Shapes: I catalogue size, R users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gr.data.sequences import ITEM, TIME, Sequences


class TargetKinds:
    """Counts of held-out targets: ``cold`` (the item is never a training action), ``repeated`` (it is in the user's
    history already, kept or not) and ``tied`` (the target's time is the previous action's, so that their order is the
    log's).

    training_counts: gives (I,) how often each item is a training action; asked when first needed.  timed: whether
    actions have times.
    """

    def __init__(self, training_counts: Callable[[], np.ndarray], timed: bool) -> None:
        self.needs = frozenset({ITEM, TIME} if timed else {ITEM})
        self._training_counts = training_counts
        self.names = ["cold", "repeated", *(["tied"] if timed else [])]
        self.restart()

    def restart(self) -> TargetKinds:
        """Count from zero: a pass over the targets begins, at the end of which ``complete`` is set."""
        self.complete = False
        self.counts = np.zeros(1 + len(self.names), np.int64)
        """Targets, then those of each kind."""
        return self

    def add(self, rows: Sequences, who_R: np.ndarray, target_R: np.ndarray) -> None:
        """Count the targets at the indices ``target_R`` (1 or more) of the users ``who_R`` of ``rows``."""
        place_R = rows.offsets_R1[who_R] + target_R
        items_R = rows.items_A[place_R]
        kinds = {"cold": self._training_counts()[items_R] == 0, "repeated": _repeated(rows, who_R, target_R)}
        if "tied" in self.names:
            assert rows.timestamps_A is not None
            kinds["tied"] = rows.timestamps_A[place_R] == rows.timestamps_A[place_R - 1]
        self.counts += [len(who_R), *(int(kinds[name].sum()) for name in self.names)]

    def shares(self, counts: Sequence[int]) -> dict[str, float]:
        """Share of the targets by kind, of ``counts`` (several processes' added up); empty without targets."""
        total, *each = counts
        return (
            {f"{n}_targets": count / total for n, count in zip(self.names, each, strict=True)}
            if total
            else {}
        )


def _repeated(rows: Sequences, who_R: np.ndarray, target_R: np.ndarray) -> np.ndarray:
    """(R,) whether the target's item is one of the actions before it."""
    history = rows.select({ITEM}).take(who_R, stop=target_R)
    owner_A = np.repeat(np.arange(len(who_R)), history.lengths_R)
    same_A = history.items_A == rows.items_A[rows.offsets_R1[who_R] + target_R][owner_A]
    return np.bincount(owner_A[same_A], minlength=len(who_R)) > 0
