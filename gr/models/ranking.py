"""Ranking: the probability that a user's action on a given item has this or that label (Zhai et al., arXiv
2402.17152, speak of it as the ranking task; a label is what gr.labels says).

items and what their actions were -> input -> sequence encoder -> with the candidate's vector -> MLP -> a logit a task.

Pointwise: a prediction knows the user's actions before one, with their labels, and the item and time of that one, which
is the candidate; it predicts that action's labels.  How items and actions become rows of the encoder is
``model.actions``:

- ``summed``: a row an action, its item's vector and its labels' added up; row i answers for the action after it, and
  meets the candidate in the head alone.
- ``interleaved`` (the paper's Phi_0, a_0, Phi_1, a_1, ...): a row for each item and one for what was done with it
  (gr/models/interleaved.py); an item's own row answers for it, so that attention knows the candidate.
- ``together``: a row an action as in ``summed``, and a row of its own for each candidate, which attention shows the
  actions before its request and no other candidate (gr/models/together.py).

Shapes: B sequences, A actions of the batch, T input rows, S candidates, K tasks, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gr import registry
from gr.batch import Jagged, SequenceBatch
from gr.config import DISTINCT, FRACTION, POSITIVE, ComponentConfig, InputSection, RunConfig, component
from gr.embeddings.view import View
from gr.errors import UserError
from gr.labels import TASKS, idle_weights
from gr.models import init
from gr.models.cut import Cut
from gr.models.dropout import Dropout
from gr.models.encoder import check_causal
from gr.models.features import sum_of, vectors, vectors_of
from gr.models.init import initialise
from gr.models.input import ItemInput
from gr.models.interleaved import Interleaved, Interleaving
from gr.models.layers import Linear
from gr.models.layout import sequence_of_rows
from gr.models.memory import Memory
from gr.models.model import Catalogue
from gr.models.pointwise import Pointwise
from gr.models.step import StepContext
from gr.models.tasks import Known, Supervision, places_asked, sources
from gr.models.together import Gathering, Together
from gr.modes import evaluating
from gr.processes import Axis, Processes
from gr_kernels.counter_random import derive_key


@dataclass(frozen=True)
class Labelled:
    """A micro-batch of summed rows: the inputs, the candidates and what there is to predict of them.

    sequence: input rows, and as targets the candidates' item rows.  history_TK, labels_SK: float32, the labels of the
    input actions and of the candidates' actions, NaN where unknown.  candidates: what is known of the candidates'
    items, by feature.
    """

    sequence: Supervision
    history_TK: Tensor
    labels_SK: Tensor
    candidates: Mapping[str, Known] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """S: every next action is a target, whatever is known of its labels."""
        return self.sequence.count

    @property
    def targets_S(self) -> Tensor:
        return self.sequence.targets_S

    def part_of(self, context: Axis) -> Labelled:
        """This process's rows of the sequences, where processes share them."""
        sequence = self.sequence.part_of(context)
        if (cut := sequence.layout.cut) is None:
            return self
        chosen = {name: known.part_of(cut) for name, known in self.candidates.items()}
        return Labelled(sequence, self.history_TK[cut.numbers_T], self.labels_SK[cut.numbers_T], chosen)


class Ranking(Pointwise):
    """Sequences in, losses or logits of the tasks out; a sequence encoder tells what a user is after."""

    class Config(ComponentConfig):
        """tasks: what is predicted (gr.labels).  hidden: widths of the head's layers.  table, table_std: as in
        retrieval.  actions: how items and what was done with them become rows.  request: of ``together``, the column
        whose equal values say that consecutive actions were shown together.  context: features of users that are a
        row each in front of a user's actions, instead of being added to all.  interaction: what the head is given of
        query h and candidate e: h * e (``product``), or [h, e, h * e] (``all``)."""

        name: Literal["ranking"] = "ranking"
        dim: POSITIVE = 50
        table: component(registry.TABLES, "model.table", default="local")
        table_std: Annotated[float, Field(ge=0)] = 0.02
        input: InputSection = InputSection()
        encoder: component(registry.ENCODERS, "model.encoder")
        tasks: TASKS
        actions: Literal["summed", "interleaved", "together"] = "summed"
        request: str = "time"
        context: Annotated[list[str], DISTINCT] = []
        interaction: Literal["all", "product"] = "all"
        hidden: list[POSITIVE] = [64]
        hidden_dropout: FRACTION = 0.0

        def idle(self) -> dict[str, str]:
            idle = idle_weights(self.tasks)
            if not self.hidden:
                idle["hidden_dropout"] = "hidden is empty"
            if self.actions == "summed":
                idle["context"] = "actions is summed, and features of users are added to every row"
            if self.actions != "together":
                idle["request"] = f"actions is {self.actions}, and each action is judged by itself"
            return idle

    def __init__(
        self, config: Config, run: RunConfig, catalogue: Catalogue, processes: Processes | None = None
    ) -> None:
        super().__init__(config, run, catalogue, processes)
        self.interleaving: Interleaving | None = None
        places, rows = run.data.max_length, run.data.max_length
        contexts = len(config.context) if config.actions != "summed" else 0
        if config.actions == "interleaved":
            self.interleaving = Interleaving(self.features, self.labels, config.context)
            # the candidate has a place of its own; and each action two rows
            places, rows = places + 1, contexts + 2 * places + 1
        elif config.actions == "together":
            columns = catalogue.manifest.columns
            self.interleaving = Gathering(self.features, self.labels, config.context, config.request, columns)
            places, rows = places + 1, contexts + places + 1
            self.needs = self.needs | {config.request}
        self.input = ItemInput(config.input, config.dim, places, False, config.table_std)
        self.history = HistoryLabels(len(self.labels.names), config.dim, config.table_std)
        if contexts:
            self.contexts = Contexts(contexts, config.dim, config.table_std)
        self.encoder = config.encoder.build(config.dim, rows)
        check_causal(self.task, self.encoder, config.encoder.name, instead="")
        if config.actions == "together":
            _check_together(config, run, self.encoder)
        self.head = Head(
            config.dim, config.hidden, len(self.labels.names), config.hidden_dropout, config.interaction
        )
        times = {"time"} if self.encoder.uses_times else set()
        self.needs = self.needs | times
        initialise(self, run.train.seed)

    @property
    def cuttable(self) -> bool:  # type: ignore[override]
        return self.encoder.cuttable and self.interleaving is None

    @property
    def columns_of_requests(self) -> list[str]:
        found = super().columns_of_requests
        if isinstance(self.interleaving, Gathering) and self.interleaving.column not in found:
            found = [*found, self.interleaving.column]
        return found

    # -- inputs and targets ------------------------------------------------------------------------------------------

    def supervise(self, batch: SequenceBatch, key: int, dropout_key: int = 0) -> Labelled | Interleaved:
        batch = self.prepare(batch)
        if self.interleaving is not None:
            return self.interleaving.supervise(batch, dropout_key)
        sequence = self.features.of_inputs(batch, self.task.supervise(batch, key, dropout_key))
        source_T = sources(batch, sequence.layout)
        labels_AK = self.labels.of(batch.columns)
        targets_S = (source_T if sequence.queries_S is None else source_T[sequence.queries_S]) + 1
        candidates = self.features.known_of_items_at(batch, targets_S)
        return Labelled(sequence, labels_AK[source_T], labels_AK[targets_S], candidates)

    def asked(self, batch: SequenceBatch) -> Labelled | Interleaved:
        batch = self.prepare(batch)
        if self.interleaving is not None:
            return self.interleaving.request(batch)
        last_B = places_asked(batch)
        sequence = self.features.of_inputs(batch, self.task.request(batch))
        history_TK = self.labels.of(batch.columns)[sources(batch, sequence.layout)]
        candidates = self.features.known_of_items_at(batch, last_B)
        return Labelled(sequence, history_TK, history_TK.new_empty(0), candidates)

    def rows_of(self, part: Labelled | Interleaved) -> dict[str, list[Tensor]]:
        if isinstance(part, Interleaved):
            return {"items": [part.items_A], **{name: [known.rows_V] for name, known in part.known.items()}}
        found = {name: [known.rows_V] for name, known in part.sequence.features.items()}
        for name, known in part.candidates.items():
            found[name].append(known.rows_V)
        return {"items": [part.sequence.tokens_T, part.targets_S], **found}

    # -- what the network makes of them ------------------------------------------------------------------------------

    def logits_of(self, part: Labelled | Interleaved, views: Mapping[str, View]) -> Tensor:
        layout = part.layout if isinstance(part, Interleaved) else part.sequence.layout
        if self.encoder.uses_times and layout.key_times_T is None:
            raise UserError(
                "the encoder uses the times of actions and this dataset has none: "
                "set model.encoder.relative_time=false"
            )
        if isinstance(part, Interleaved):
            x_TD, items_AD, beside_AD = self.interleaved(part, views)
            candidates_SD = items_AD.index_select(0, part.targets_S_in_A)
            if isinstance(part, Together):
                shown_SD = candidates_SD + beside_AD.index_select(0, part.targets_S_in_A)
                queries_SD = self._together(part, x_TD, shown_SD)
            else:
                queries_SD = self.encoder(x_TD, layout).index_select(0, part.queries_S)
        else:
            queries_SD = part.sequence.select(self.encoder(self.summed(part, views), layout))
            candidates_SD = self.candidates(part.targets_S, part.candidates, views)
        return self.head(queries_SD, candidates_SD, layout.dropout_key, layout.cut)

    def scores(self, batch: SequenceBatch, candidates: Jagged, at_once: int = 256) -> Tensor:
        """(C, K) float32 log-odds of many candidates of each sequence, ``at_once`` of a sequence at a time.

        candidates: B lists of int64 item rows on the model's device.  A sequence's last action stands in their place:
        it says when, and what else is known of the request; its item is not looked at.  The history is computed once;
        what comes out is what :meth:`logits` gives for each candidate by itself, but for rounding."""
        if self.interleaving is not None and not self.encoder.cuttable:
            return super().scores(batch, candidates, at_once)  # rows meet elsewhere than in attention
        with evaluating(self):
            batch = self.prepare(batch.with_columns(item=batch.items_T.clamp_min(0)))
            return self._scores(batch, candidates, at_once)

    def _scores(self, batch: SequenceBatch, candidates: Jagged, at_once: int) -> Tensor:
        owners_C = sequence_of_rows(candidates.offsets, len(candidates.values))
        known = self.features.known_of_items(candidates.values)
        history = self.interleaving.history(batch) if self.interleaving else self.asked(batch)
        wanted = self.wanted([history], StepContext(0))
        wanted["items"].append(candidates.values)
        for name, one in known.items():
            wanted[name].append(one.rows_V)
        views = self.fetch(wanted)
        answer = self._answering(history, batch, views)
        found_CK = torch.empty(len(owners_C), len(self.labels.names), device=owners_C.device)
        for chosen_C, counts in _rounds(candidates, owners_C, at_once):
            part = {name: one.at(chosen_C) for name, one in known.items()}
            vectors_CD = self.candidates(candidates.values[chosen_C], part, views)
            queries_CD = answer(vectors_CD, owners_C[chosen_C], counts)
            found_CK[chosen_C] = self.head(queries_CD, vectors_CD, 0).float()
        return found_CK

    def _answering(
        self, history: Labelled | Interleaved, batch: SequenceBatch, views: Mapping[str, View]
    ) -> Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]:
        """(vectors (C, D) of candidates, whose they are (C,), how many of each sequence) -> their queries (C, D)."""
        if isinstance(history, Labelled):
            layout = history.sequence.layout
            queries_BD = history.sequence.select(self.encoder(self.summed(history, views), layout))
            return lambda vectors_CD, owners_C, counts: queries_BD[owners_C]
        layout, last_B = history.layout, batch.offsets_B1[1:] - 1
        memory = Memory(layout.offsets_B1, layout.lengths, layout.key_times_T)
        x_TD, _, beside_AD = self.interleaved(history, views)
        self.encoder(x_TD, replace(layout, memory=memory))
        beside_BD = beside_AD[last_B]
        times_B = None if batch.timestamps_T is None else batch.timestamps_T[last_B]

        def answer(vectors_CD: Tensor, owners_C: Tensor, counts: tuple[int, ...]) -> Tensor:
            where = memory.layout_of(counts, None if times_B is None else times_B[owners_C])
            return self.encoder(vectors_CD + beside_BD[owners_C], where)

        return answer

    def _together(self, part: Together, x_TD: Tensor, shown_SD: Tensor) -> Tensor:
        """(S, D) queries of candidates in rows of their own, shown_SD, behind as much of the rows of histories as their
        requests know."""
        layout = part.layout
        memory = Memory(layout.offsets_B1, layout.lengths, layout.key_times_T)
        self.encoder(x_TD, replace(layout, memory=memory))
        times_S = None if part.times_A is None else part.times_A[part.targets_S_in_A]
        key = derive_key(layout.dropout_key, "candidates")
        where = memory.layout_of(part.counts, times_S, part.seen, key)
        return self.encoder(self.input.dropout(shown_SD, derive_key(key, "input")), where)

    def candidates(self, items_S: Tensor, known: Mapping[str, Known], views: Mapping[str, View]) -> Tensor:
        """(S, D) vectors of items, as large as where they are inputs."""
        vectors_SD = views["items"].lookup(items_S)
        of_items_SD = sum_of(known, views, items_S.shape[0])
        return (vectors_SD if of_items_SD is None else vectors_SD + of_items_SD) * self.input.scale

    def summed(self, part: Labelled, views: Mapping[str, View]) -> Tensor:
        """The encoder's input (T, D), a row an action."""
        sequence = part.sequence
        return self.input(
            sequence.tokens_T,
            sequence.layout,
            views["items"].lookup(sequence.tokens_T),
            vectors(sequence, views),
            self.history(part.history_TK),
        )

    def interleaved(self, part: Interleaved, views: Mapping[str, View]) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's input (T, D); the vectors (A, D) of the items alone, and what is beside them in the row of an
        item that is asked about."""
        assert self.interleaving is not None
        known, count = self.interleaving.by_kind(part), part.items_A.shape[0]
        items_AD = self.candidates(part.items_A, known["items"], views)
        shown_AD, done_AD = torch.zeros_like(items_AD), self.history(part.labels_AK)
        if (asked_AD := sum_of(known["shown"], views, count)) is not None:
            shown_AD = asked_AD * self.input.scale
        if (after_AD := sum_of(known["done"], views, count)) is not None:
            done_AD = done_AD + after_AD * self.input.scale
        beside_AD = shown_AD
        if self.input.positions is not None:
            places_AD = F.embedding(part.places_A, self.input.positions)
            done_AD, beside_AD = done_AD + places_AD, shown_AD + places_AD
            if isinstance(part, Together):
                beside_AD = shown_AD + F.embedding(part.asked_A, self.input.positions)
        if isinstance(part, Together):
            rows = [items_AD + shown_AD + done_AD]
        else:
            rows = [items_AD + beside_AD, done_AD]
        if known["context"]:
            rows.append(self.contexts(known["context"], views, self.input.scale))
        x_TD = torch.cat(rows).index_select(0, part.rows_T)
        key = derive_key(part.layout.dropout_key, "input")
        return self.input.dropout(x_TD, key), items_AD, beside_AD


def _check_together(config: Ranking.Config, run: RunConfig, encoder: Any) -> None:
    """Refuse what has not both a history that is computed once and candidates behind it."""
    name = config.encoder.name
    if not encoder.cuttable:
        raise UserError(
            f"config key 'model.actions' is 'together', and model.encoder {name} reads row after row: candidates that "
            "don't see each other need an encoder with attention (hstu, sasrec, transformer)"
        )
    if getattr(config.encoder, "attention_dropout", 0.0):
        raise UserError(
            "config key 'model.actions' is 'together', whose attention drops no weights: set "
            "model.encoder.attention_dropout=0"
        )
    if run.train.activation_checkpointing:
        raise UserError(
            "train.activation_checkpointing forms layers again, which would keep their keys and values twice: leave it "
            "out, or use model.actions=interleaved"
        )


def _rounds(candidates: Jagged, owners_C: Tensor, at_once: int) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Which candidates are scored together, ascending, and how many of each sequence."""
    counts = candidates.offsets.diff()
    within_C = torch.arange(len(owners_C), device=owners_C.device) - candidates.offsets[owners_C]
    for first in range(0, int(counts.max()) if len(counts) else 0, at_once):
        chosen_C = ((within_C >= first) & (within_C < first + at_once)).nonzero().squeeze(1)
        yield chosen_C, tuple((counts - first).clamp(0, at_once).tolist())


class HistoryLabels(nn.Module):
    """What an input action was, as a vector beside its item's: for each task one vector where it has the label and
    another where it hasn't, nothing where that is unknown."""

    def __init__(self, tasks: int, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * tasks, dim))
        self.std = std

    def initialisers(self) -> dict[str, init.Initialiser]:
        return {"weight": init.normal(self.std)}

    def forward(self, labels_TK: Tensor) -> Tensor:
        """(T, K) 1, 0 or NaN -> (T, D)."""
        which_TC = torch.cat([labels_TK == 1, labels_TK == 0], dim=1).to(self.weight.dtype)
        return which_TC @ self.weight


class Contexts(nn.Module):
    """Rows in front of a user's actions: a feature of the user each, and a vector of the row's own."""

    def __init__(self, rows: int, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))
        self.std = std

    def initialisers(self) -> dict[str, init.Initialiser]:
        return {"weight": init.normal(self.std)}

    def forward(self, features: Mapping[str, Known], views: Mapping[str, View], scale: float) -> Tensor:
        """(B * C, D): of each sequence its C rows."""
        found = [vectors_of(known, views[name]) * scale for name, known in features.items()]
        return (torch.stack(found, dim=1) + self.weight).flatten(0, 1)


class Head(nn.Module):
    """Logits of (query, candidate) pairs: an MLP of [h, e, h * e], or of h * e alone; float32 whatever the encoder
    computes in."""

    def __init__(
        self, dim: int, hidden: Sequence[int], tasks: int, dropout: float, interaction: str = "all"
    ) -> None:
        super().__init__()
        self.interaction = interaction
        widths = [(3 if interaction == "all" else 1) * dim, *hidden]
        self.layers = nn.ModuleList(Linear(i, o, init.xavier_uniform) for i, o in zip(widths, widths[1:]))
        self.out = Linear(widths[-1], tasks, init.xavier_uniform)
        self.dropout = Dropout(dropout)

    def forward(
        self, queries_SD: Tensor, candidates_SD: Tensor, dropout_key: int, cut: Cut | None = None
    ) -> Tensor:
        """(S, D), (S, D) -> (S, K)."""
        with torch.autocast(queries_SD.device.type, enabled=False):
            h_SD = queries_SD if queries_SD.dtype == torch.float64 else queries_SD.float()
            x = h_SD * candidates_SD
            if self.interaction == "all":
                x = torch.cat([h_SD, candidates_SD, x], dim=1)
            for number, layer in enumerate(self.layers):
                x = self.dropout(F.relu(layer(x)), derive_key(dropout_key, "head", number), cut)
            return self.out(x)
