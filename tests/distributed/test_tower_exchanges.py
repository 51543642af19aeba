"""What towers exchange, looked at by itself: who encodes what, where vectors go and gradients come from, and that all
take part in what one of them has to do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gr import config as configs
from gr.embeddings.scoring import Scoring
from gr.embeddings.shares import Shares
from gr.modality import tower as tower_module
from gr.modality.content import FixedShares
from gr.modality.tower import Tower
from gr.modality.vectors import as_table
from gr.processes import Processes, processes
from gr.train.parts import build
from tests.distributed.group import in_group
from tests.distributed.jobs import refusals
from tests.end_to_end.tiny import CONFIG, make_dataset
from tests.packages import needs
from tests.precision import tolerance
from tests.towers import make_encoder, titles

needs("transformers", "torchrec", "fbgemm_gpu")
RANKS, ITEMS, DIM = 3, 59, 16  # stretches of 19, 20 and 20 items
# Rows that each process looks at in a step, several times some: the second one at none, the third at some of the
# first's and at others; and those that stand in its sequences, of which one is a candidate of another process
WANTED = ([*range(2, 40, 3), 5, 5, 2], [], [58, 5, 8, 11, 30, 50, 58])
BATCHES = ([5, 2, 5], [], [58, 30])
SOME = [0, 3, 19, 20, 41, 58]
NEW = pa.table(
    {"item_id": [100, 101, 102, 103], "title": ["red soap", "oil", None, "brush for old hair you"]}
)
# Two layers of width 16 on ten tokens and a head, all of unit size, and back
CLOSE = tolerance(64, stages=12, size=10.0)
SCORING = Scoring()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[dict, list[dict]]:
    """What :func:`looked_at` finds on one process, and on each of several."""
    folder = tmp_path_factory.mktemp("exchanges")
    make_dataset(folder / "data", items=ITEMS, described={"title": titles(ITEMS)})
    make_encoder(folder / "encoder")
    (folder / "run.yaml").write_text(CONFIG.format(run=folder / "run", data=folder / "data"))
    one, several = (in_group(looked_at, n, folder / f"{n}", str(folder), by_hand=False) for n in (1, RANKS))
    return one[0], several


def looked_at(folder: str) -> dict[str, Any]:
    with processes("cpu", threads=1, timeout=timedelta(minutes=2)) as joined:

        def tower(*overrides: str, **section: Any) -> Tower:
            given = {"name": "text", "text": {"encoder": f"{folder}/encoder", "batch": 7}, **section}
            asked = [f"model.item_tower={json.dumps(given)}", "model.table=mapped", *overrides]
            return build(configs.load(f"{folder}/run.yaml", asked), joined).model.items

        tuned, refreshed = tower(mode="tuned"), tower(mode="tuned", refresh=4)
        return {
            "step": a_step(tuned, joined),
            "all": whole_catalogue(tuned, joined),
            "kept": kept_vectors(refreshed, joined),
            "search": searched(tower("model.table=torchrec", name="fused", fusion="gated"), joined),
            "sketches": sketches(joined),
        }


def of_ranks(joined: Processes) -> list[int]:
    """Whose part of a step is this process's: one process has everybody's."""
    return [joined.world.rank] if joined.world.size > 1 else [*range(RANKS)]


def rows_of(some: list[list[int]] | tuple, joined: Processes) -> Tensor:
    return torch.tensor([row for rank in of_ranks(joined) for row in some[rank]], dtype=torch.int64)


@contextmanager
def counting(tower: Tower) -> Iterator[list[int]]:
    """The items that this process encodes inside, each time that it does."""
    content = getattr(tower.content, "formed", tower.content)
    items, rows = content.items, []
    inputs = items.inputs
    items.__dict__["inputs"] = lambda rows_m: (rows.extend(rows_m.tolist()), inputs(rows_m))[1]
    try:
        yield rows
    finally:
        del items.__dict__["inputs"]


def a_step(tower: Tower, joined: Processes, number: int = 0) -> dict[str, Any]:
    """Vectors of the rows that this process looks at, and the gradients of all: of a sum in which each look-up of each
    process counts otherwise."""
    tower.begin(number, [rows_of(BATCHES, joined)])
    wanted = rows_of(WANTED, joined)
    with counting(tower) as encoded:
        view = tower.views([wanted])[tower.name]
    vectors_nD = view.lookup(wanted)
    weights = [torch.arange(1.0, len(WANTED[rank]) + 1) * (1 + rank) for rank in of_ranks(joined)]
    if len(wanted):  # else its share of a batch is empty, and no backward pass comes by
        (vectors_nD.sin() * torch.cat(weights)[:, None]).sum().backward()
    tower.take_back(view)
    named = dict(tower.named_parameters())
    missing = [name for name, parameter in named.items() if parameter.grad is None]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in named.values()]
    flat = joined.world.add_up(torch.cat([gradient.flatten() for gradient in gradients]))
    tower.zero_grad()
    return {
        "rows": wanted,
        "vectors": vectors_nD.detach(),
        "gradients": flat,
        "missing": missing,
        "encoded": encoded,
    }


def whole_catalogue(tower: Tower, joined: Processes) -> dict[str, Any]:
    content, rows = tower.content, torch.tensor(SOME)
    with counting(tower) as encoded, torch.no_grad():
        own = content.own()
    with counting(tower) as of_some, torch.no_grad():
        some = content.some(rows)
    new = content.unseen(NEW).detach()
    return {"own": own.detach(), "encoded": encoded, "some": some, "some encoded": of_some, "new": new}


def kept_vectors(tower: Tower, joined: Processes) -> dict[str, Any]:
    """Of a step that forms all, of one after the encoder has moved, and of one before which a row was lost that the
    last process alone keeps."""
    first = a_step(tower, joined, 0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(1.5)
    second = a_step(tower, joined, 1)
    size, place, values = tower.content.state()["content"]
    kept = values.clone()
    tower.content._all_there = False
    if place + len(values) == ITEMS:
        values[-1] = torch.nan
    third = a_step(tower, joined, 2)
    return {
        "steps": [first, second, third],
        "size": size,
        "place": place,
        "kept": kept,
        "anew": tower.content.state()["content"][2],
    }


def searched(tower: Tower, joined: Processes) -> dict[str, Any]:
    """Rows formed by stretches, of which some take one piece and others two."""
    tower_module.ROWS_AT_ONCE, before = ITEMS // RANKS, tower_module.ROWS_AT_ONCE
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randn(2 * (rank != 1), DIM, generator=generator) for rank in range(RANKS)]
    own = torch.cat([queries[rank] for rank in of_ranks(joined)])
    rows = torch.arange(15, 45)
    try:
        with torch.no_grad():
            scores, best = tower.topk(own, 9, SCORING)
            view = tower.kept_view([rows, rows[:3]])
            found = {
                "stretch": tower.kept().own_RE,
                "scores": scores,
                "best": best,
                "some": tower.vectors(15, 45),
                "seen": view.lookup(rows),
                "watched": tower.watched(),
            }
        tower.views([rows])  # a step, in which rows of ids move that the first process alone owns
        if joined.is_main:
            for piece in tower.beneath[0].pieces():
                piece.values_RC[:3] += 1.0
        tower.beneath[0].refilled()
        joined.barrier()
        with torch.no_grad():
            return found | {"moved": tower.vectors(0, 30)}
    finally:
        tower_module.ROWS_AT_ONCE = before


def sketches(joined: Processes) -> list[list[float]]:
    """Of all items' vectors, and of those of the first: fewer than the first process holds."""
    whole_IE = torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(0))
    world = joined.world
    own = whole_IE[world.own(ITEMS).start : world.own(ITEMS).stop]
    content = FixedShares(DIM, lambda: Shares(ITEMS, own, world), lambda items: own, joined, file="v.parquet")
    made = [content.sketch(), content.sketch(7), content.sketch(30)]
    return [[*sketch.sums, sketch.size, sketch.rows] for sketch in made if sketch is not None]


def assert_steps_alike(one: dict, several: list[dict], rows: set[int]) -> None:
    """rows: those that a step encodes."""
    starts = [0, len(WANTED[0]), len(WANTED[0]), len(one["rows"])]
    for rank, found in enumerate(several):
        mine = slice(starts[rank], starts[rank + 1])
        assert torch.equal(found["rows"], one["rows"][mine])
        torch.testing.assert_close(found["vectors"], one["vectors"][mine], **CLOSE)
        scale = one["gradients"].abs().max()
        torch.testing.assert_close(found["gradients"] / scale, one["gradients"] / scale, **CLOSE)
        assert not found["missing"], "an optimiser would leave it, and an exchange wait for it"
    everybodys = [row for found in several for row in found["encoded"]]
    assert sorted(everybodys) == sorted(one["encoded"]) == sorted(rows), "each is encoded, and once"


LOOKED_AT = {row for rows in WANTED for row in rows}
IN_BATCH = {row for rows in BATCHES for row in rows}


def test_each_item_of_a_step_is_encoded_by_one_and_its_gradients_come_back_from_all(found):
    one, several = found[0]["step"], [of_rank["step"] for of_rank in found[1]]
    assert_steps_alike(one, several, LOOKED_AT)
    counts = [len(of_rank["encoded"]) for of_rank in several]
    assert max(counts) - min(counts) <= 1, "who looks at nothing encodes as many"


def test_kept_vectors_are_everybodys(found):
    """The batch is everybody's: an item that stands in another process's sequences has a gradient as a candidate.
    Where a row has never been formed all form all, whoever keeps it."""
    one, several = found[0]["kept"], [of_rank["kept"] for of_rank in found[1]]
    steps = [[of_rank["steps"][number] for of_rank in several] for number in range(3)]
    every = [*range(ITEMS)]
    assert_steps_alike(one["steps"][0], steps[0], [*every, *IN_BATCH])
    assert_steps_alike(one["steps"][1], steps[1], IN_BATCH)
    assert_steps_alike(one["steps"][2], steps[2], [*every, *IN_BATCH])
    for number in (1, 2):  # what is kept has no gradient, and is what it was
        moved = (one["steps"][number]["vectors"] - one["steps"][0]["vectors"]).abs().amax(1)
        fresh = torch.tensor([int(row) in IN_BATCH for row in one["steps"][0]["rows"]])
        assert moved[fresh].min() > 1e-3
    places = [of_rank["place"] for of_rank in several]
    assert places == [0, 19, 39] and all(of_rank["size"] == [ITEMS, DIM] for of_rank in several)
    for name in ("kept", "anew"):
        assert torch.equal(torch.cat([of_rank[name] for of_rank in several]), one[name])
    assert not torch.equal(one["kept"], one["anew"])


def test_all_items_are_encoded_once_to_the_same_bits(found):
    one, several = found[0]["all"], [of_rank["all"] for of_rank in found[1]]
    assert torch.equal(torch.cat([of_rank["own"] for of_rank in several]), one["own"])
    for name, rows in (("encoded", [*range(ITEMS)]), ("some encoded", SOME)):
        everybodys = sorted(row for of_rank in several for row in of_rank[name])
        assert everybodys == sorted(one[name]) == rows
    for of_rank in several:
        assert torch.equal(of_rank["new"], one["new"])
        torch.testing.assert_close(of_rank["some"], one["own"][SOME], **CLOSE)


def test_stretches_of_formed_rows_are_searched_as_one(found):
    one, several = found[0]["search"], [of_rank["search"] for of_rank in found[1]]
    stretches = [of_rank["stretch"] for of_rank in several]
    assert [len(stretch) for stretch in stretches] == [19, 20, 20]
    torch.testing.assert_close(torch.cat(stretches), one["stretch"], **CLOSE)
    torch.testing.assert_close(torch.cat([of_rank["scores"] for of_rank in several]), one["scores"], **CLOSE)
    assert torch.equal(torch.cat([of_rank["best"] for of_rank in several]), one["best"])
    for of_rank in several:
        for name in ("some", "seen"):
            torch.testing.assert_close(of_rank[name], one["stretch"][15:45], **CLOSE)
        assert of_rank["watched"] == pytest.approx(one["watched"], rel=1e-4)
        torch.testing.assert_close(of_rank["moved"], one["moved"], **CLOSE)
    apart = (one["moved"] - one["stretch"][:30]).abs().amax(1)
    assert apart[:3].min() > 1e-2 and apart[3:].max() == 0


def test_a_sketch_is_of_everybodys_vectors(found):
    for of_rank in found[1]:
        for mine, ones in zip(of_rank["sketches"], found[0]["sketches"], strict=True):
            assert mine == pytest.approx(ones, rel=1e-9)


OF_HOSTS = {
    "tuned": {"mode": "tuned", "text": {"encoder": "encoder"}},
    "frozen": {"text": {"encoder": "encoder"}},
    "adapters": {"mode": "adapters", "text": {"encoder": "encoder"}},
    "cached": {"mode": "cached", "vectors": "vectors.parquet"},
}


def refused(folder: str) -> list[str | None]:
    """What this process is refused with where the same paths lead to files of its own."""
    os.chdir(f"{folder}/host-{dist.get_rank()}")
    towers = [f"model.item_tower={json.dumps({'name': 'text', **tower})}" for tower in OF_HOSTS.values()]
    asked = [{"config": f"{folder}/run.yaml", "overrides": [tower, "train.max_steps=1"]} for tower in towers]
    return refusals(json.dumps(asked))


def test_hosts_with_other_encoders_or_vectors_are_refused(tmp_path):
    """Each process would form rows by its own, and nothing would ever tell."""
    make_dataset(tmp_path / "data", items=ITEMS, described={"title": titles(ITEMS)})
    (tmp_path / "run.yaml").write_text(CONFIG.format(run=tmp_path / "run", data=tmp_path / "data"))
    for rank in range(2):
        make_encoder(tmp_path / f"host-{rank}" / "encoder", seed=rank)
        vectors = torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(rank))
        file = tmp_path / f"host-{rank}" / "vectors.parquet"
        pq.write_table(as_table(pa.array(range(ITEMS)), vectors), file)
    said = in_group(refused, 2, tmp_path / "group", str(tmp_path))
    assert said[0] == said[1]
    *of_encoders, of_file = said[0]
    for sentence in of_encoders:
        assert sentence.startswith("the encoder of model.item_tower (weights) is ")
        assert " on rank 1 (" in sentence and sentence.endswith(": have the same files on all hosts")
    assert of_file.startswith("'vectors.parquet' has other vectors on rank 1 (")
    assert not (tmp_path / "run").exists()
