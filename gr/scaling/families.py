"""Floating-point operations of a training step of any model, counted from the model itself and the real lengths of its
sequences, by the rules of gr/scaling/flops.py.

    retrieval             encoder on the inputs (of n + 1 actions n; all, of a task that hides some), loss on targets
    ranking, summed       encoder on n rows, head on n candidates
    ranking, interleaved  encoder on C + 2 a - 1 rows of a sequence of a actions, head on a - 1 candidates
    din, dlrm             a candidate for each action but the first, with all actions before it: a (a - 1) / 2 pairs
    two_tower             the network on each action

What is looked up, pooled or multiplied number by number is left out there as here.  A layer whose input has no
gradient (it is labels, or counts) does half the backward work of another.

Shapes: B sequences of a actions each, T input rows, S candidates, P pairs, K tasks, D model width, U distinct items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from gr.config import RunConfig
from gr.models.din import DIN
from gr.models.dlrm import DLRM
from gr.models.layers import Linear
from gr.models.model import Model
from gr.models.ranking import Ranking
from gr.models.retrieval import Retrieval
from gr.models.two_tower.layers import CrossNet, Interacting
from gr.models.two_tower.model import TwoTower
from gr.models.two_tower.towers import IntTower
from gr.scaling.flops import EncoderWork, Flops, Part, entries, products, retrieval, weights_of

Array = np.ndarray


class ModelAccounting:
    """What a step of ``model``, built as ``config`` says, costs."""

    def __init__(self, model: Model, config: RunConfig) -> None:
        self.model, self.config = model, config
        self.count = next(count for kind, count in FAMILIES.items() if isinstance(model, kind))
        encoder = getattr(model, "encoder", None)
        self.encoder = None if encoder is None else EncoderWork(encoder, config)

    def step(self, actions_B: Sequence[int] | Array, targets: int | None = None) -> Flops:
        """actions_B: of each sequence, the predicted one included.  targets: that are predicted, where it is known."""
        return Flops(self.count(self, np.asarray(actions_B, np.float64), targets))

    def tokens(self, actions_B: Sequence[int] | Array) -> int:
        """Actions that the model reads as inputs: of a sequence all but the one that is predicted last."""
        actions = np.asarray(actions_B, np.int64)
        if isinstance(self.model, TwoTower):
            return int(actions.sum())
        task = getattr(self.model, "task", None)
        return int(np.maximum(actions - 1 + (0 if task is None else task.extra_inputs), 0).sum())

    def loss(self, targets: int) -> float:
        """Operations of the loss of a global batch's targets, whose candidates may be each other; 0 where it's none of
        products."""
        part = self.step([], targets).parts.get("loss")
        return 0.0 if part is None else part.forward + part.backward


def _sum(*parts: Part) -> Part:
    return Part(sum(p.forward for p in parts), sum(p.backward for p in parts))


def _retrieval(account: ModelAccounting, actions_B: Array, targets: int | None) -> dict[str, Part]:
    model = account.model
    assert isinstance(model, Retrieval) and account.encoder is not None
    rows_B = np.maximum(actions_B - 1 + model.task.extra_inputs, 0)
    return retrieval(account.config, account.encoder, rows_B, targets, model.items.rows)


def _ranking(account: ModelAccounting, actions_B: Array, targets: int | None) -> dict[str, Part]:
    model, D = account.model, account.config.model.dim
    assert isinstance(model, Ranking) and account.encoder is not None
    S = float(np.maximum(actions_B - 1, 0).sum()) if targets is None else float(targets)
    if model.interleaving is None:
        rows_B = np.maximum(actions_B - 1, 0)
        labelled = float(rows_B.sum())
    else:
        contexts = len(account.config.model.context)
        rows_B = np.where(actions_B > 0, contexts + 2 * actions_B - 1, 0)
        labelled = float(actions_B.sum())
    T = float(rows_B.sum())
    found = account.encoder.parts(rows_B)
    found["embedding"] = Part(2 * T * D, 2 * T * D)
    found["labels"] = products(labelled, entries(model.history.weight), inputs_have_gradients=False)
    found["head"] = products(S, weights_of(model.head))
    return found


def _pairs(actions_B: Array, targets: int | None) -> tuple[float, float, float]:
    """(A, S, P): where not all actions are targets, the pairs are those of as many average ones."""
    A, all_S = float(actions_B.sum()), float(np.maximum(actions_B - 1, 0).sum())
    P = float((actions_B * np.maximum(actions_B - 1, 0) / 2).sum())
    S = all_S if targets is None else float(targets)
    return A, S, P * S / max(all_S, 1)


def _din(account: ModelAccounting, actions_B: Array, targets: int | None) -> dict[str, Part]:
    model = account.model
    assert isinstance(model, DIN)
    A, S, P = _pairs(actions_B, targets)
    first, *others = model.unit.layers
    assert isinstance(first, Linear)
    quarter = (
        entries(first.weight) // 4
    )  # of the past, of the candidate, of their difference (in both) and product
    behind = sum(weights_of(layer) for layer in others) + weights_of(model.unit.out)
    return {
        "linear": _sum(products(A + S + P, quarter), products(P, behind)),
        "labels": products(A, entries(model.history.weight), inputs_have_gradients=False),
        "head": products(S, weights_of(model.head)),
    }


def _dlrm(account: ModelAccounting, actions_B: Array, targets: int | None) -> dict[str, Part]:
    model, D = account.model, account.config.model.dim
    assert isinstance(model, DLRM)
    _, S, _ = _pairs(actions_B, targets)
    vectors = 3 + len(model.labels.names) + len(model.features.of_requests) + len(model.features.of_items)
    first = weights_of(model.bottom.layers[0])
    return {
        "linear": _sum(
            products(S, first, inputs_have_gradients=False),
            products(S, weights_of(model.bottom) - first),
            products(S, vectors * vectors * D),
        ),
        "head": products(S, weights_of(model.head)),
    }


def _two_tower(account: ModelAccounting, actions_B: Array, targets: int | None) -> dict[str, Part]:
    model = account.model
    assert isinstance(model, TwoTower)
    network: Any = model.network
    S = float(actions_B.sum())
    found, cross = products(S, weights_of(network)), None
    for module in network.modules():
        if isinstance(module, Interacting):  # a row for each field, of which each looks at all
            fields, dim = network.fields, network.dim
            found = _sum(found, products(S * (fields - 1), weights_of(module)))
            found = _sum(found, products(S, 2 * fields * fields * dim))
        elif isinstance(module, CrossNet):
            cross = products(S, entries(module.weight))
    if isinstance(network, IntTower):
        config = network.config
        heads = len(network.used) * config.heads
        # its gradient is a matter of rows (gr.models.two_tower.fe_block)
        found = _sum(found, Part(2 * S * heads * config.item_heads * config.head_dim, 0.0))
        if config.cir:
            # at most: each liked impression meets all items, and how many are liked lengths don't tell; gradients are
            # formed with the loss (gr.models.two_tower.contrast)
            found = _sum(found, Part(6 * S * S * config.tower[-1], 0.0))
    return {"linear": found} if cross is None else {"linear": found, "cross": cross}


FAMILIES: dict[type[nn.Module], Callable[[ModelAccounting, Array, int | None], dict[str, Part]]] = {
    Retrieval: _retrieval,
    Ranking: _ranking,
    DIN: _din,
    DLRM: _dlrm,
    TwoTower: _two_tower,
}
