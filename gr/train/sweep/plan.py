"""What a sweep trains: its file, and the cells that follow from it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from gr.config import COUNT, DISTINCT, FRACTION, POSITIVE, RunConfig, Section, load, read_yaml, validate
from gr.errors import UserError
from gr.scaling.flops import Accounting
from gr.shipped import find_sweep
from gr.train.cells import Cell
from gr.train.sweep.lengths import batch_lengths

ALWAYS = ("log.every_steps=1", "log.plots=false", "log.tensorboard=false", "checkpoint.keep=1")
"""Of every member, before what the sweep's file says: the loss of each step, and little on the disk."""
TRAINING = "training_loss"
PROBED = 4
"""Batches that tell what a step costs, where budgets say how many steps there are."""


class Budget(Section):
    """Floating-point operations of a training, and the widths that are trained with them: all of the dial's where none
    are named."""

    flops: Annotated[float, Field(gt=0)]
    widths: Annotated[list[POSITIVE], DISTINCT, Field(min_length=1)] | None = None


BUDGET = Annotated[
    Budget, BeforeValidator(lambda value: value if isinstance(value, dict | Budget) else {"flops": value})
]


class Family(Section):
    """Models that one law is fitted to.  config: a run's config (a file beside the sweep's, or the name of one that
    ships); set: dotted keys over it; dial: keys of the dial that are others for this family."""

    config: str
    set: dict[str, Any] = {}
    dial: dict[str, Any] = {}


class Dial(Section):
    """One number, the width, from which the rest of a model's shape follows.

    model.dim is the width; heads are ``head`` wide (one head where the width is less), layers one for each ``aspect``
    of the width, a feed-forward layer four times as wide inside; the learning rate is ``rate`` at width ``reference``
    and falls with width^-power (1: what keeps Adam's updates of hidden layers alike, arXiv 2203.03466).  warmup: the
    share of a member's steps that it warms up in, where budgets say how many these are."""

    widths: Annotated[list[POSITIVE], DISTINCT, Field(min_length=1)]
    head: POSITIVE = 32
    aspect: POSITIVE = 32
    rate: Annotated[float, Field(gt=0)] = 1e-3
    reference: POSITIVE = 64
    power: Annotated[float, Field(ge=0)] = 1.0
    warmup: FRACTION | None = None

    def overrides(self, width: int, encoder: str) -> dict[str, Any]:
        heads = max(1, width // self.head)
        if width % heads:
            raise UserError(
                f"dial.widths has {width}, which {heads} heads of about {self.head} cannot share: choose multiples of "
                "dial.head"
            )
        layers = max(1, round(width / self.aspect))
        shape: dict[str, dict[str, Any]] = {
            "hstu": {"heads": heads, "qk_dim": width // heads, "v_dim": width // heads},
            "transformer": {"heads": heads, "ffn": 4 * width},
            "sasrec": {"heads": heads, "ffn": 4 * width},
            "gru4rec": {"hidden": width},
            "pooled": {"hidden": 4 * width},
        }
        if encoder not in shape:
            raise UserError(
                f"the dial doesn't know model.encoder {encoder}: write its keys into grid or members"
            )
        keys = {f"model.encoder.{key}": value for key, value in {"layers": layers, **shape[encoder]}.items()}
        rate = self.rate * (self.reference / width) ** self.power
        return {"model.dim": width, **keys, "optimizer.lr": float(f"{rate:.4g}")}


class FitSection(Section):
    """of: what the law is of, ``training_loss`` (the objective's own, the mean over the last ``share`` of the steps: of
    new actions, as long as nothing is seen twice) or a metric of the test split: ``loss`` and others that fall as they
    are, those that rise as 1 - metric.  also: others of these, with laws of their own.

    points: ``frontier``, the members than which no cheaper one is better; ``valleys``, the lowest points of the curves
    of equal compute; or ``all``.  held_out: points of the most compute in each family that the law is not fitted to
    but has to predict.  floor: what of the loss is known to be irreducible, a number or ``oracle``, the loss of the
    generated dataset's best scorer: what lies above it has laws too."""

    of: str = TRAINING
    also: Annotated[list[str], DISTINCT] = []
    share: Annotated[FRACTION, Field(gt=0)] = 0.1
    points: Literal["frontier", "valleys", "all"] = "frontier"
    held_out: COUNT = 1
    floor: Annotated[float, Field(gt=0)] | Literal["oracle"] | None = None
    replicates: POSITIVE = 400


class SweepConfig(Section):
    """A sweep.

    dataset, options: generated where no member's config says where its data are (``data.path`` in a set).  set: dotted
    keys of every member.  Members are every width of the dial, with every budget (floating-point operations of a
    training, from which train.max_steps follows), with every combination of the grid (a list of values for each dotted
    key); or with each of ``members``, mappings of dotted keys."""

    families: Annotated[dict[str, Family], Field(min_length=1)]
    dataset: str | None = None
    options: dict[str, Any] = {}
    set: dict[str, Any] = {}
    dial: Dial | None = None
    budgets: list[BUDGET] = []
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    members: list[dict[str, Any]] = []
    fit: FitSection = FitSection()

    @model_validator(mode="after")
    def _something_varies(self) -> SweepConfig:
        if self.grid and self.members:
            raise ValueError("grid and members both say what differs: give one of them")
        if not (self.dial or self.budgets or self.grid or self.members):
            raise ValueError("nothing differs between members: give a dial, budgets, a grid or members")
        known = self.dial.widths if self.dial else []
        if strange := [w for budget in self.budgets for w in budget.widths or [] if w not in known]:
            raise ValueError(f"budgets name the width {strange[0]}, which dial.widths doesn't have")
        for name in self.families:
            self.dial_of(name)
        for key in ("run.dir", "run.name"):
            if key in {*self.set, *self.grid, *itertools.chain(*self.members)}:
                raise ValueError(f"{key} is the sweep's own: it names the members' folders")
        return self

    def dial_of(self, family: str) -> Dial | None:
        """The dial as a family has it."""
        own = self.families[family].dial
        if self.dial is None:
            if own:
                raise ValueError(
                    f"families.{family}.dial changes a dial that isn't there: add one to the sweep"
                )
            return None
        return validate(Dial, self.dial.model_dump() | own, f"families.{family}.dial")


@dataclass(frozen=True)
class Member:
    """values: what differs from its family's other members, by the name it is shown under."""

    family: str
    cell: Cell
    config: RunConfig
    values: dict[str, Any] = field(default_factory=dict)


def read_sweep(path: str | Path) -> tuple[SweepConfig, Path]:
    """The sweep in a YAML file, or of that name among those that come with gr; and the file."""
    file = find_sweep(path)
    sweep: SweepConfig = validate(SweepConfig, read_yaml(file), "")
    return sweep, file


def members_of(
    sweep: SweepConfig, file: Path, out: Path, data: str | None, overrides: Sequence[str] = ()
) -> tuple[list[Member], list[str]]:
    """All members, the families one after the other, and a sentence for each budget that a width has too few data for:
    these are left out.  data: the generated dataset.  overrides: dotted, of every member, the last word.  Reads a few
    batches where budgets say how long a training is."""
    found: list[Member] = []
    left_out: list[str] = []
    for name, family in sweep.families.items():
        beside = file.parent / family.config
        config = beside if beside.is_file() else family.config
        common = {**({} if data is None else {"data.path": data}), **sweep.set, **family.set}
        base = (*ALWAYS, *map(_override, common.items()))
        model = load(config, (*base, *overrides)).model
        if model.name != "retrieval":
            raise UserError(
                f"family '{name}' has model.name {model.name}, which has no loss over the catalogue and whose budgets "
                "nobody counts: sweeps are of retrieval models (a two-tower one has model.encoder pooled)"
            )
        encoder = model.encoder.name
        dial = sweep.dial_of(name)
        for values, changes in _variations(sweep, dial, encoder):
            member = (*base, *map(_override, changes.items()), *overrides)
            label = "-".join([_word(name), *(_word(f"{k}{_short(v)}") for k, v in values.items())])
            made = _loaded(config, member, label)
            if (budget := values.get("flops")) is not None:
                steps, available = _steps_of(made, budget)
                if steps > available:
                    left_out.append(
                        f"'{label}' is left out: {budget:.3g} operations are {steps:,} steps, and its data have "
                        f"{available:,}"
                    )
                    continue
                member = (*member, f"train.max_steps={steps}")
                if dial is not None and dial.warmup is not None:
                    member = (*member, f"schedule.warmup_steps={round(dial.warmup * steps)}")
            cell = Cell(label, config, str(out / "members" / label), member)
            found.append(Member(name, cell, _loaded(config, member, label), values))
    names = [member.cell.name for member in found]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two members of the sweep are '{repeated[0]}': let every value stand once")
    if not found:
        raise UserError(
            f"no member of the sweep has data enough ({left_out[0]}): lower budgets, or bring more data"
        )
    return found, left_out


def _loaded(config: str | Path, overrides: Sequence[str], label: str) -> RunConfig:
    """A member's config; where it can't be one, the sentence says whose."""
    try:
        return load(config, overrides)
    except UserError as error:
        raise UserError(f"member '{label}' of the sweep can't be: {error}") from error


def _variations(
    sweep: SweepConfig, dial: Dial | None, encoder: str
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(shown values, dotted keys) of each member of a family."""
    rows = sweep.members or [
        dict(zip(sweep.grid, values)) for values in itertools.product(*sweep.grid.values())
    ]
    for width, budget in _sizes(sweep, dial):
        for row in rows:
            shown: dict[str, Any] = {}
            changes = dict(row)
            if width is not None and dial is not None:
                shown["width"] = width
                changes = {**dial.overrides(width, encoder), **row}
            if budget is not None:
                shown["flops"] = budget
            yield shown | {key.rpartition(".")[2]: value for key, value in row.items()}, changes


def _sizes(sweep: SweepConfig, dial: Dial | None) -> Iterator[tuple[int | None, float | None]]:
    """(width, budget) of each size."""
    every: list[int | None] = [*dial.widths] if dial else [None]
    if not sweep.budgets:
        yield from ((width, None) for width in every)
    for budget in sweep.budgets:
        yield from ((width, budget.flops) for width in budget.widths or every)


def _steps_of(config: RunConfig, budget: float) -> tuple[int, int]:
    """How many steps cost ``budget`` operations, and how many there are data for."""
    lengths, available = batch_lengths(config, PROBED)
    account = Accounting(config, lengths.items)
    a_step = sum(account.step(*batch).total for batch in lengths.batches) / len(lengths.batches)
    return max(1, round(budget / a_step)), available


def _override(item: tuple[str, Any]) -> str:
    return f"{item[0]}={json.dumps(item[1])}"  # JSON is YAML


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _word(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+]+", "_", text)
