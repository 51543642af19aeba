"""Item heads: the item side of a pre-ranking run (IntTower) for its whole catalogue, computed once and kept in a file.

One safetensors file: ``heads`` (J, I, K) float32 as gr.models.two_tower.scoring reads them, ``bias`` (1,), and in its
metadata the run's step, the generation of the dataset whose catalogue's order the rows have, and the user's layers.

Shapes: B users, H heads of a user, J of an item, I items, K width of a head.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gr.batch import SequenceBatch
from gr.data.catalogue import Catalogue
from gr.data.outputs import delivered
from gr.errors import UserError
from gr.eval.evaluator import EvalResult
from gr.models.two_tower.model import TwoTower
from gr.models.two_tower.scoring import Encoding, last_layer, score_all, search
from gr.models.two_tower.towers import IntTower
from gr.modes import evaluating
from gr.train.runs import OpenRun

ITEMS_AT_ONCE = 4096
KIND = "gr item heads 1"


@dataclass(frozen=True)
class ItemHeads:
    """heads_JIK, bias: see above.  layers: of the user's tower that have heads."""

    heads_JIK: Tensor
    bias: Tensor
    layers: int
    step: int
    generation: str

    def save(self, path: str | Path) -> None:
        """Write the file; it is there whole or not at all."""
        told = {
            "kind": KIND,
            "layers": str(self.layers),
            "step": str(self.step),
            "generation": self.generation,
        }
        try:
            with delivered(path) as scratch:
                save_file({"heads": self.heads_JIK, "bias": self.bias}, scratch, told)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write the item heads to '{path}' ({error}): choose another --out"
            ) from None

    @staticmethod
    def open(path: str | Path) -> ItemHeads:
        try:
            with safe_open(str(path), "pt") as file:
                told = file.metadata() or {}
                if told.get("kind") != KIND:
                    raise UserError(f"'{path}' holds no item heads: write them with python -m gr index")
                return ItemHeads(
                    file.get_tensor("heads"),
                    file.get_tensor("bias"),
                    int(told["layers"]),
                    int(told["step"]),
                    told["generation"],
                )
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"'{path}' can't be read as item heads ({error}): write them with python -m gr index"
            ) from None


def item_heads(run: OpenRun) -> ItemHeads:
    """Of the run's whole catalogue, in its order."""
    model, network = _inttower(run)
    parts = []
    with evaluating(model):
        for batch in _items(model, run.data.catalogue):
            known = model.item.known(model.item.prepare(batch), *_places(batch))
            views = model.fetch(known.wanted())
            heads_SJK = network.item_side(model.item.look_up(known, views))
            parts.append(heads_SJK.float().cpu().transpose(0, 1))
    bias = network.bias.weight.detach().float().cpu().clone()
    generation = run.data.dataset.manifest.generation
    heads_JIK = torch.cat(parts, dim=1).contiguous()
    return ItemHeads(heads_JIK, bias, len(network.used), run.step, generation)


def user_heads(model: TwoTower, batch: SequenceBatch) -> Tensor:
    """(B, H, K) float32 on the CPU: of the user of each row's last action, the layers' one after another."""
    network = model.network
    assert isinstance(network, IntTower)
    with evaluating(model):
        prepared = model.user.prepare(batch)
        last_B = batch.offsets_B1[1:] - 1
        rows_B = torch.arange(batch.sequences, device=last_B.device)
        known = model.user.known(prepared, last_B, rows_B)
        views = model.fetch(known.wanted())
        return network.user_side(model.user.look_up(known, views)).float().cpu()


@dataclass(frozen=True)
class Found:
    """What an index finds of the exact best items of ``users`` users.  exact_ms, last_ms, searched_ms: a user's.
    recall: by number of candidates, the share of the exact k best among the k returned; last_recall: the same of the
    last layer's scores alone."""

    users: int
    items: int
    k: int
    encoding: int
    recall: dict[int, float]
    last_recall: float
    exact_ms: float
    last_ms: float
    searched_ms: dict[int, float]


def measure(
    run: OpenRun,
    heads: ItemHeads,
    *,
    users: int = 200,
    k: int = 100,
    candidates: Sequence[int] = (200, 500, 1000),
    encoding: Encoding | None = None,
    split: str = "test",
) -> Found:
    """Recall of the search against exact scores, for the users of a split's first rows."""
    check(run, heads)
    model, _ = _inttower(run)
    encoding = encoding or Encoding.of(heads.heads_JIK.shape[2])
    encoded_IE = encoding.of_items(heads.heads_JIK)
    asked = 0
    times = dict.fromkeys(["exact", "last", *candidates], 0.0)
    hits = dict.fromkeys(["last", *candidates], 0)
    wanted = min(k, heads.heads_JIK.shape[1])
    for request in run.evaluation().requests(split):
        for user_HK in user_heads(model, request.batch.slice(0, min(users - asked, len(request)))):
            asked += 1
            started = time.perf_counter()
            best = set(score_all(user_HK, heads.heads_JIK).topk(wanted).indices.tolist())
            times["exact"] += time.perf_counter() - started
            started = time.perf_counter()
            of_last = score_all(last_layer(user_HK, heads.layers), heads.heads_JIK).topk(wanted).indices
            times["last"] += time.perf_counter() - started
            hits["last"] += len(best & set(of_last.tolist()))
            for count in candidates:
                started = time.perf_counter()
                _, rows = search(user_HK, heads.heads_JIK, encoding, encoded_IE, k, count)
                times[count] += time.perf_counter() - started
                hits[count] += len(best & set(rows.tolist()))
        if asked >= users:
            break
    total = max(asked * wanted, 1)
    ms = {name: 1000 * seconds / max(asked, 1) for name, seconds in times.items()}
    return Found(
        asked,
        heads.heads_JIK.shape[1],
        wanted,
        encoding.dim,
        {count: hits[count] / total for count in candidates},
        hits["last"] / total,
        ms["exact"],
        ms["last"],
        {count: ms[count] for count in candidates},
    )


def judged(run: OpenRun, split: str = "test") -> dict[str, EvalResult]:
    """The run's metrics on a split by all layers, and by the last layer alone."""
    model, _ = _inttower(run)
    evaluation = run.evaluation()
    scorers = {"all layers": model, "last layer": LastLayer(model)}
    return {name: evaluation.run(split, scorer) for name, scorer in scorers.items()}


class LastLayer:
    """A run's model as it scores with the heads of the user's last layer alone; for evaluations of that."""

    def __init__(self, model: TwoTower) -> None:
        network = model.network
        assert isinstance(network, IntTower)
        self.model, self.network = model, network

    def logits(self, batch: SequenceBatch) -> Tensor:
        """(B, 1) float32."""
        last_B, rows_B = batch.offsets_B1[1:] - 1, torch.arange(batch.sequences)
        user_BHK = last_of_batch(user_heads(self.model, batch), len(self.network.used))
        with evaluating(self.model):
            known = self.model.item.known(self.model.item.prepare(batch), last_B, rows_B)
            views = self.model.fetch(known.wanted())
            item_BJK = self.network.item_side(self.model.item.look_up(known, views))
        best_BH = torch.bmm(user_BHK, item_BJK.float().cpu().transpose(1, 2)).amax(2)
        return best_BH.sum(1, keepdim=True) + self.network.bias.weight.detach().cpu()


def last_of_batch(user_BHK: Tensor, layers: int) -> Tensor:
    """The last layer's heads of each user."""
    return user_BHK[:, -(user_BHK.shape[1] // layers) :]


def check(run: OpenRun, heads: ItemHeads) -> None:
    """Refuse heads of another run's step or another catalogue."""
    generation = run.data.dataset.manifest.generation
    if heads.generation != generation or heads.step != run.step:
        raise UserError(
            f"the item heads are of step {heads.step} and dataset generation {heads.generation}, and the run "
            f"'{run.folder.path}' is at step {run.step} of generation {generation}: write them again"
        )


def _inttower(run: OpenRun) -> tuple[TwoTower, IntTower]:
    model = run.model
    if not isinstance(model, TwoTower) or not isinstance(model.network, IntTower):
        raise UserError(
            f"'{run.folder.path}' has no item heads, which model.network=inttower has alone: choose a run of that"
        )
    return model, model.network


def item_columns(model: TwoTower, catalogue: Catalogue) -> dict[str, Tensor]:
    """What a model reads of an item beside itself, (I,) each, of what the catalogue knows; refused where that isn't
    all."""
    for field in model.item.fields:
        if field.column is not None:
            raise UserError(
                f"model.item.fields.{field.name} is a column of actions, '{field.column}', and of an item that nobody "
                "was shown yet the catalogue alone knows something: give the field a column of it (catalogue: ...)"
            )
    numbers: dict[str, Tensor] = {}
    for name in model.item.numbers:
        if name not in catalogue.column_names:
            raise UserError(
                f"model.item.numbers has '{name}', and the catalogue of the dataset has no such column, which alone "
                "knows something of an item that nobody was shown yet: prepare the dataset with it"
            )
        numbers[name] = catalogue.numbers(name)
    return numbers


def _items(model: TwoTower, catalogue: Catalogue) -> Iterator[SequenceBatch]:
    """The items as batches of one action each, with what the catalogue knows in the place of actions' columns."""
    numbers = item_columns(model, catalogue)
    for start in range(0, catalogue.rows, ITEMS_AT_ONCE):
        rows = torch.arange(start, min(start + ITEMS_AT_ONCE, catalogue.rows))
        columns = {name: values[rows] for name, values in numbers.items()}
        batch = SequenceBatch(torch.arange(len(rows) + 1), rows, (1,) * len(rows), {"item": rows, **columns})
        yield replace(batch, user_columns={n: columns[n] for n in model.item.of_users}).to(model.device)


def _places(batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    every = torch.arange(batch.sequences, device=batch.items_T.device)
    return every, every
