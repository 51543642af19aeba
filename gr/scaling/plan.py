"""A plan on paper: what a training of a config would take on a cluster that need not be there.

Tables are cut by TorchRec's planner, a step of one process is rehearsed (gr/scaling/rehearsal.py), and from both follow
memory, exchanges and the time of a step.  Nothing is allocated and no GPU is asked.

Shapes: G sequences of a global batch, B of a process's share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from gr import config as configs
from gr.batch import SequenceBatch
from gr.config import RunConfig
from gr.embeddings.planned import PlannedTable
from gr.embeddings.torchrec_plan import NoRoom, TablePlan
from gr.errors import UserError
from gr.models.context import check_shareable
from gr.models.model import Catalogue
from gr.scaling.families import ModelAccounting
from gr.scaling.imagined import ImaginedCatalogue, batch, drawn_lengths, heaviest_share
from gr.scaling.machine import Machine
from gr.scaling.memory import Memory, Sharing, memory
from gr.scaling.rehearsal import Paper, Rehearsal
from gr.scaling.timing import Exchange, StepTime, exchanges, step_time

PFLOP_DAY = 1e15 * 86400
UNBOUNDED = 1 << 52
"""Bytes of a device on which every table fits: to say by how much one doesn't."""
DOUBLINGS = 4


class Source(Protocol):
    """Where a plan's batches come from."""

    @property
    def catalogue(self) -> Catalogue: ...

    def batches(
        self, config: RunConfig, needs: frozenset[str], processes: int
    ) -> tuple[np.ndarray, SequenceBatch]:
        """(actions (G,) of the sequences of a global batch, the share of the process with the most work, or of those
        that share its sequences)."""
        ...


@dataclass(frozen=True)
class Imagined:
    """Batches as ``data.expected`` describes them."""

    config: RunConfig

    def __post_init__(self) -> None:
        if self.config.data.expected is None:
            raise UserError(
                f"there is no dataset at '{self.config.data.path}', and the config doesn't say what it will hold: give "
                "data.expected (items, users, lengths), or data.path of one that is there"
            )

    @property
    def catalogue(self) -> Catalogue:
        assert self.config.data.expected is not None
        return ImaginedCatalogue(self.config.data.expected)

    def batches(
        self, config: RunConfig, needs: frozenset[str], processes: int
    ) -> tuple[np.ndarray, SequenceBatch]:
        expected, task = config.data.expected, getattr(config.model, "task", None)
        assert expected is not None
        extra = 0 if task is None else task.build().extra_inputs
        lengths_G = drawn_lengths(expected.lengths, config.train.global_batch, config.data.max_length + extra)
        share_B = heaviest_share(lengths_G, processes)
        ahead = 0 if config.model.name == "two_tower" else 1 - extra
        return lengths_G + ahead, batch(config, needs, expected, share_B, ahead)


@dataclass(frozen=True)
class Plan:
    """What a training would take.

    settings: what this plan varies.  memory: of the fullest process.  flops: of a step, all processes together.
    tokens: real ones of a step.  problem: what doesn't fit, "" where all does; remedies: changes that would make it
    fit, each alone.
    """

    settings: dict[str, Any]
    processes: int
    machine: Machine
    parameters: int
    tables: list[TablePlan]
    rehearsal: Rehearsal
    memory: Memory
    exchanges: list[Exchange]
    time: StepTime
    flops: float
    tokens: int
    problem: str = ""
    remedies: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.problem

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.time.seconds

    @property
    def mfu(self) -> float:
        """The model's operations as a share of what the devices' ceilings (of bfloat16, or of float32) allow."""
        return self.flops / (self.time.seconds * self.processes * self.machine.bf16)

    def budget(self, tokens: float, price: float | None) -> dict[str, float]:
        """Of a training on so many tokens: steps, days, PFLOP-days and, where an hour of a device has a price, cost."""
        steps = tokens / self.tokens
        seconds = steps * self.time.seconds
        found = {"steps": steps, "days": seconds / 86400, "pflop_days": steps * self.flops / PFLOP_DAY}
        return found if price is None else {**found, "cost": seconds / 3600 * self.processes * price}


class Planner:
    """Plans of one config, from one source of batches."""

    def __init__(self, config: RunConfig, source: Source, machine: Machine) -> None:
        self.config, self.source, self.machine = config, source, machine
        self._papers: dict[Any, tuple[Paper, str]] = {}
        self._rehearsals: dict[Any, Any] = {}

    def plan(self, config: RunConfig, processes: int, settings: dict[str, Any], advise: bool = True) -> Plan:
        """Of a variant of the config on so many devices.  advise: say what would make it fit, where it doesn't."""
        groups, rest = divmod(processes, config.train.context)
        if rest:
            raise UserError(
                f"{processes} processes can't be cut into groups of {config.train.context} that share a sequence "
                "(train.context): plan for a multiple, or change it"
            )
        if config.train.global_batch < groups:
            each = "processes" if config.train.context == 1 else "groups of processes"
            raise UserError(
                f"train.global_batch is {config.train.global_batch}, fewer sequences than {groups} {each}: raise "
                "it, or plan for fewer"
            )
        paper, no_room = self._paper(config, processes)
        check_shareable(paper.model, config)
        actions_G, rehearsal = self._rehearsed(paper, processes)
        account = ModelAccounting(paper.model, config)
        found = memory(paper, rehearsal)
        problem = no_room or self._problem(found)
        made = Plan(
            settings=settings,
            processes=processes,
            machine=self.machine,
            parameters=_parameters(paper),
            tables=[t.plan for t in paper.model.tables.values() if isinstance(t, PlannedTable)],
            rehearsal=rehearsal,
            memory=found,
            exchanges=exchanges(paper, rehearsal),
            time=step_time(paper, rehearsal, self.machine),
            flops=account.step(actions_G).total + _of_tower(rehearsal),
            tokens=account.tokens(actions_G),
            problem=problem,
        )
        if problem and advise:
            made = replace(made, remedies=list(self._remedies(config, processes)))
        return made

    def grid(
        self,
        nodes: Sequence[int],
        varied: dict[str, Sequence[Any]],
        say: Callable[[str], None] = lambda sentence: None,
    ) -> list[Plan]:
        """Plans of all pairs of numbers of machines and values of sharding, zero and batch; best first: those that fit,
        by the cheapest token.  say: is given a sentence of each pair that can't be; where none can, the first one's is
        raised."""
        found: list[Plan] = []
        refusals: dict[str, UserError] = {}
        pairs = [
            {"nodes": machines, **dict(zip(varied, values))}
            for machines, *values in itertools.product(nodes, *varied.values())
        ]
        for settings in pairs:
            processes = settings["nodes"] * self.machine.per_machine
            try:
                config = with_settings(self.config, settings)
                found.append(self.plan(config, processes, settings, advise=len(pairs) == 1))
            except UserError as error:
                refusals[", ".join(f"{name} {value}" for name, value in settings.items())] = error
        if not found:
            raise next(iter(refusals.values()))
        for named, refusal in refusals.items():
            say(f"left out, {named}: {refusal}")
        found.sort(key=lambda plan: (not plan.fits, plan.processes / plan.tokens_per_second))
        if len(found) > 1 and not found[0].fits:
            best = min(found, key=lambda plan: plan.memory.peak)
            config = with_settings(self.config, best.settings)
            advice = list(self._remedies(config, best.processes))
            found = [replace(p, remedies=advice) if p is best else p for p in found]
        return found

    def _paper(self, config: RunConfig, processes: int) -> tuple[Paper, str]:
        """The model, and a sentence where a table of it fits on no device."""
        named = configs.to_dict(config)
        key = (processes, *(str(named[part]) for part in ("model", "objective", "optimizer")))
        if key not in self._papers:
            on = self.machine.cluster(processes)
            try:
                self._papers[key] = Paper(config, self.source.catalogue, on), ""
            except NoRoom as error:
                roomy = replace(on, hardware=replace(on.hardware, memory=UNBOUNDED), host_memory=UNBOUNDED)
                rows = _by_rows(config)
                self._papers[key] = Paper(rows, self.source.catalogue, roomy), str(error)
        paper, no_room = self._papers[key]
        return paper.under(config), no_room

    def _rehearsed(self, paper: Paper, processes: int) -> tuple[np.ndarray, Rehearsal]:
        config = paper.config
        keep = Sharing.of(config, processes).keeps_gradients
        named = configs.to_dict(config)
        key = (
            id(paper.model),
            keep,
            processes,
            str(named["data"]),
            *(
                getattr(config.train, part)
                for part in (
                    "global_batch",
                    "micro_batch_actions",
                    "activation_checkpointing",
                    "precision",
                    "context",
                )
            ),
        )
        if key not in self._rehearsals:
            groups, needs = processes // config.train.context, paper.model.needs
            actions_G, share = self.source.batches(config, needs, groups)
            whole = None if paper.tower is None or groups == 1 else self.source.batches(config, needs, 1)[1]
            self._rehearsals[key] = actions_G, paper.rehearse(share, keep, whole)
        return self._rehearsals[key]

    def _problem(self, found: Memory) -> str:
        room = self.machine.memory
        if found.peak <= room:
            return ""
        name, most = max(found.parts.items(), key=lambda part: part[1])
        return (
            f"a process needs {found.peak / 2**30:,.1f} GiB of {room / 2**30:,.1f}: most are {name} "
            f"({most / 2**30:,.1f} GiB)"
        )

    def _remedies(self, config: RunConfig, processes: int) -> Iterator[str]:
        """Changes that would make it fit, each alone, the smallest of its kind."""
        tables_fit = not self._paper(config, processes)[1]
        for kind in _changes(config, processes, self.machine.per_machine, tables_fit):
            for change, (overrides, count) in kind:
                try:
                    made = self.plan(configs.override(config, overrides), count, {}, advise=False)
                except UserError:
                    continue
                if made.fits:
                    yield f"{change} ({made.memory.peak / 2**30:,.1f} GiB, {made.tokens_per_second:,.0f} tokens/s)"
                    break


_Change = tuple[str, tuple[list[str], int]]


def _changes(
    config: RunConfig, processes: int, per_machine: int, tables_fit: bool
) -> Iterator[Iterable[_Change]]:
    """By kind, (what is changed, (overrides, processes)), the smallest change first; where tables don't fit, what helps
    them."""
    train = config.train
    if config.optimizer.name in ("adamw", "lazy_adam"):
        yield [(o := "optimizer.name=rowwise_adagrad", ([o], processes))]
    yield [
        (f"{(count := processes << n) // per_machine} nodes", ([], count))
        for n in range(1, DOUBLINGS + 1)
        if processes % per_machine == 0 and processes << n <= train.global_batch
    ]
    if not tables_fit:
        return
    if not train.activation_checkpointing:
        yield [("train.activation_checkpointing=true", (["train.activation_checkpointing=true"], processes))]
    tower: Any = getattr(config.model, "item_tower", None)
    if getattr(tower, "mode", "") in ("tuned", "adapters") and not tower.recompute:
        yield [(o := "model.item_tower.recompute=true", ([o], processes))]
    smaller = [train.micro_batch_actions >> n for n in range(1, 7)]
    smaller = [actions for actions in smaller if actions >= config.data.max_length]
    yield [(o := f"train.micro_batch_actions={actions}", ([o], processes)) for actions in smaller]
    zero = 3 if train.engine.name == "fsdp" else getattr(train.engine, "zero", 0)
    yield [
        (o := f"train.engine={{name: deepspeed, zero: {stage}}}", ([o], processes))
        for stage in range(zero + 1, 4)
    ]


def with_settings(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """``config`` with a sharding of its sharded tables, a ZeRO stage and a global batch, where they are given."""
    overrides = []
    if (batch_size := settings.get("batch")) is not None:
        overrides.append(f"train.global_batch={batch_size}")
    if (stage := settings.get("zero")) is not None:
        overrides.append(f"train.engine={{name: deepspeed, zero: {stage}}}" if stage else "train.engine=ddp")
    if (sharding := settings.get("sharding")) is not None:
        if not _sharded(config):
            raise UserError(
                f"no table of the config is cut among processes, by {sharding} or otherwise: use model.table=torchrec, "
                "or leave --sharding out"
            )
        overrides += [f"{key}={{name: torchrec, sharding: {sharding}}}" for key in _sharded(config)]
    return configs.override(config, overrides)


def _by_rows(config: RunConfig) -> RunConfig:
    overrides = [f"{key}={{name: torchrec, sharding: row_wise}}" for key in _sharded(config)]
    return configs.override(config, overrides)


def _sharded(config: RunConfig) -> list[str]:
    """The keys of the tables that TorchRec cuts."""
    model: Any = config.model
    found = ["model.table"] if getattr(getattr(model, "table", None), "name", "") == "torchrec" else []
    features = model.input.features if hasattr(model, "input") else {}
    return found + [
        f"model.input.features.{name}.table" for name, f in features.items() if f.table.name == "torchrec"
    ]


def _parameters(paper: Paper) -> int:
    rows = sum(t.rows * (t.dim + t.spec.bias) for t in paper.model.tables.values() if not t.dense)
    return rows + sum(paper.dense.values())


def _of_tower(rehearsal: Rehearsal) -> float:
    return 0.0 if rehearsal.encoding is None else rehearsal.encoding.flops.total
