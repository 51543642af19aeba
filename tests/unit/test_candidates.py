"""Many candidates against one history: what is computed once gives what each by itself would be given."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gr.batch import UNKNOWN, Jagged
from tests.precision import tolerance
from tests.unit.models_common import generator
from tests.unit.test_models_interleaved import ITEMS, build, shown

# sums of up to 24 terms in a few layers, twice in another order
OFF = tolerance(24, stages=20, size=30.0)
HSTU = {"name": "hstu", "dropout": 0.0}
ENCODERS = {
    "hstu": HSTU,
    "no position": {**HSTU, "relative_position": False},
    "no bias": {**HSTU, "relative_position": False, "relative_time": False},
    "softmax": {**HSTU, "activation": "softmax", "heads": 2},
    "sasrec": {"name": "sasrec", "dropout": 0.0, "attention_dropout": 0.0},
    "gru4rec": {"name": "gru4rec"},
    "transformer": {"name": "transformer", "dropout": 0.0, "attention_dropout": 0.0},
}


def asked(lengths=(6, 1, 9), counts=(7, 3, 0), seed=0):
    b = shown(lengths, seed)
    items = torch.randint(0, ITEMS, (sum(counts),), generator=generator(seed + 4))
    return b, Jagged(torch.tensor([0, *counts]).cumsum(0), items)


def one_by_one(model, b, candidates):
    """Each candidate in its sequence's last place."""
    found = []
    for sequence, (first, stop) in enumerate(
        zip(candidates.offsets.tolist(), candidates.offsets.tolist()[1:])
    ):
        alone = b.slice(sequence, sequence + 1)
        for item in candidates.values[first:stop]:
            found.append(
                model.logits(
                    alone.with_columns(item=alone.items_T.index_fill(0, alone.offsets_B1[1:] - 1, item))
                )
            )
    return torch.cat(found)


@pytest.mark.parametrize("at_once", [2, 64])
@pytest.mark.parametrize("actions", ["interleaved", "summed"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_scores_are_the_logits_of_each_candidate_by_itself(encoder, actions, at_once):
    model = build(encoder=ENCODERS[encoder], actions=actions)
    b, candidates = asked()
    scores = model.scores(b, candidates, at_once)
    assert scores.shape == (10, 2) and not scores.requires_grad
    torch.testing.assert_close(scores, one_by_one(model, b, candidates), **OFF)


@pytest.mark.parametrize("actions", ["interleaved", "summed"])
def test_neither_the_other_candidates_nor_the_placeholder_matter(actions):
    model = build(actions=actions)
    b, candidates = asked()
    scores, last = model.scores(b, candidates), b.offsets_B1[1:] - 1
    blind = b.with_columns(
        item=b.items_T.index_fill(0, last, UNKNOWN), value=b.columns["value"].index_fill(0, last, torch.nan)
    )
    assert torch.equal(model.scores(blind, candidates), scores)
    others = dataclasses.replace(candidates, values=candidates.values.clone())
    others.values[1:7] = (others.values[1:7] + 11) % ITEMS
    torch.testing.assert_close(model.scores(b, others)[[0, 7, 8, 9]], scores[[0, 7, 8, 9]], **OFF)


def test_nothing_asked_is_nothing_answered():
    model = build()
    assert model.scores(*asked(counts=(0, 0, 0))).shape == (0, 2)
