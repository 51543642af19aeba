"""Optimisers by name; a name fixes the maths, whichever implementation carries it out.

``dense(named)`` makes torch's optimiser of parameters with dense gradients, ``of_rows()`` the maths of a table that
keeps its rows to itself; with ``by_rows`` every table does.  ``moments``: what it keeps of each dense number;
``counts_steps``: whether the number of steps matters.  One that can't be had is a UserError, never another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from gr.config import ComponentConfig, ParameterGroup
from gr.embeddings.row_updates import Maths, adam, descent, rowwise_adagrad
from gr.errors import UserError

Named = Iterable[tuple[str, nn.Parameter]]
RATE = Annotated[float, Field(gt=0)]
FACTOR = Annotated[float, Field(ge=0, lt=1)]


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019); decays and moves every row of every table.

    ``implementation``: torch's fused one, NVIDIA apex's, or ``auto``: apex's on a GPU where it can be imported.
    """

    class Config(ComponentConfig):
        name: Literal["adamw"] = "adamw"
        lr: RATE = 1e-3
        betas: list[FACTOR] = Field([0.9, 0.999], min_length=2, max_length=2)
        eps: RATE = 1e-8
        weight_decay: Annotated[float, Field(ge=0)] = 0.0
        groups: list[ParameterGroup] = []
        implementation: Literal["auto", "torch", "apex"] = "auto"

    def __init__(self, config: Config):
        self.config = config

    by_rows = False
    moments = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def dense(self, named: Named) -> torch.optim.Optimizer:
        config, named = self.config, list(named)
        groups = parameter_groups(named, config.groups, config.lr, config.weight_decay)
        settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
        on_gpu = all(p.is_cuda for _, p in named)
        if (
            config.implementation != "torch"
            and (fused := _apex_adam())
            and (on_gpu or config.implementation == "apex")
        ):
            return fused(groups, adam_w_mode=True, **settings)
        if config.implementation == "apex":
            raise UserError(
                "optimizer.implementation is apex, and NVIDIA's apex cannot be imported: use torch"
            )
        return torch.optim.AdamW(groups, fused=True, **settings)

    def of_rows(self) -> Maths:
        return adam(self.config.betas, self.config.eps, all_rows=True)


class SGD:
    """Stochastic gradient descent with momentum."""

    class Config(ComponentConfig):
        name: Literal["sgd"] = "sgd"
        lr: RATE = 0.1
        momentum: FACTOR = 0.0
        weight_decay: Annotated[float, Field(ge=0)] = 0.0
        groups: list[ParameterGroup] = []

    def __init__(self, config: Config):
        self.config = config

    by_rows = False
    counts_steps = False

    @property
    def moments(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.config.momentum else ()

    def dense(self, named: Named) -> torch.optim.Optimizer:
        config = self.config
        groups = parameter_groups(list(named), config.groups, config.lr, config.weight_decay)
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)

    def of_rows(self) -> Maths:
        return descent(self.config.momentum, _decays(self.config))


class LazyAdam(AdamW):
    """AdamW for dense parameters; of tables only the rows seen in a step move, and decay.

    (All rows count the table's steps, so that a row's first update is not the first step's.)
    """

    class Config(AdamW.Config):
        name: Literal["lazy_adam"] = "lazy_adam"  # type: ignore[assignment]

    by_rows = True

    def of_rows(self) -> Maths:
        return adam(self.config.betas, self.config.eps, all_rows=False, decays=_decays(self.config))


class RowwiseAdagrad(AdamW):
    """AdamW for dense parameters; tables by Adagrad with one number a row, the seen rows alone.

    Rates of tables are set by ``groups`` (``match: ^tables``)."""

    class Config(AdamW.Config):
        name: Literal["rowwise_adagrad"] = "rowwise_adagrad"  # type: ignore[assignment]
        table_eps: RATE = 1e-8

    by_rows = True
    config: Config

    def of_rows(self) -> Maths:
        return rowwise_adagrad(self.config.table_eps, _decays(self.config))


def _decays(config: Any) -> bool:
    """Whether any parameter has a weight decay."""
    return bool(config.weight_decay or any(rule.weight_decay for rule in config.groups))


def parameter_groups(
    named: Sequence[tuple[str, nn.Parameter]], rules: list[ParameterGroup], lr: float, weight_decay: float
) -> list[dict]:
    """One group a rule (the first that matches a name takes it) and one for the rest; ``base_lr`` stays unscheduled,
    ``names`` are the parameters'.

    UserError: a rule is no regular expression.
    """
    for rule in rules:
        try:
            re.compile(rule.match)
        except re.error as error:
            raise UserError(
                f"optimizer.groups match '{rule.match}' is no regular expression ({error})"
            ) from None
    members: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(len(rules) + 1)]
    for name, parameter in named:
        index = next((i for i, rule in enumerate(rules) if re.search(rule.match, name)), len(rules))
        members[index].append((name, parameter))
    groups = []
    for rule, taken in zip([*rules, ParameterGroup(match="")], members, strict=True):
        rate = lr if rule.lr is None else rule.lr
        decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        if taken:
            names, parameters = map(list, zip(*taken, strict=True))
            groups.append(
                {"params": parameters, "names": names, "lr": rate, "base_lr": rate, "weight_decay": decay}
            )
    return groups


def first_rate(config: Any, names: Sequence[str]) -> float:
    """The unscheduled rate of the first group that parameters ``names`` make: the one that logs show."""
    named = [(name, nn.Parameter(torch.empty(0))) for name in names]
    return parameter_groups(named, config.groups, config.lr, config.weight_decay)[0]["base_lr"]


def check_rules(rules: Sequence[ParameterGroup], names: Sequence[str]) -> None:
    """Refuse a rule that takes none of the parameters ``names``, or none that an earlier rule leaves."""
    left = list(names)
    for rule in rules:
        taken = [name for name in left if re.search(rule.match, name)]
        if not taken:
            raise UserError(
                f"optimizer.groups match '{rule.match}' fits no parameter, or none that an earlier rule leaves: "
                f"names begin with {', '.join(dict.fromkeys(_part(name) for name in names))}"
            )
        left = [name for name in left if name not in taken]


def _part(name: str) -> str:
    """The part of a model that a parameter belongs to, as its name begins: tables.items.encoder, encoder, input."""
    words = name.split(".")
    return ".".join(words[:3] if words[0] == "tables" else words[:1])


def set_rate(param_groups: Sequence[dict[str, Any]], factor: float) -> None:
    """Scale every group's base rate by ``factor``."""
    for group in param_groups:
        group["lr"] = group["base_lr"] * factor


def counts_steps_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the number of steps is in ``param_groups`` (NVIDIA apex) and not in each parameter's state (torch)."""
    return type(optimizer).__module__.partition(".")[0] == "apex"


def _apex_adam() -> Any:
    try:
        from apex.optimizers import FusedAdam
    except ImportError:  # PyPI's `apex` is another project and has no such module
        return None
    return FusedAdam
