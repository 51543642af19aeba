"""Optimisers by name; a name fixes the maths, whichever implementation carries it out."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from gr.config import ComponentConfig, ParameterGroup
from gr.errors import UserError

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

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        groups = parameter_groups(model, config.groups, config.lr, config.weight_decay)
        settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
        on_gpu = all(p.is_cuda for p in model.parameters())
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

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        groups = parameter_groups(model, config.groups, config.lr, config.weight_decay)
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def parameter_groups(
    model: nn.Module, rules: list[ParameterGroup], lr: float, weight_decay: float
) -> list[dict]:
    """One group a rule (the first that matches a name takes it) and one for the rest; ``base_lr`` stays unscheduled.

    UserError: a rule is no regular expression, or takes no parameter.
    """
    for rule in rules:
        try:
            re.compile(rule.match)
        except re.error as error:
            raise UserError(
                f"optimizer.groups match '{rule.match}' is no regular expression ({error})"
            ) from None
    members: list[list[nn.Parameter]] = [[] for _ in range(len(rules) + 1)]
    for name, parameter in model.named_parameters():
        index = next((i for i, rule in enumerate(rules) if re.search(rule.match, name)), len(rules))
        members[index].append(parameter)
    for rule, parameters in zip(rules, members, strict=False):
        if not parameters:
            names = ", ".join(name for name, _ in model.named_parameters())
            raise UserError(
                f"optimizer.groups match '{rule.match}' fits no parameter, or none that an earlier rule leaves: "
                f"names are {names}"
            )
    groups = []
    for rule, parameters in zip([*rules, ParameterGroup(match="")], members, strict=True):
        rate = lr if rule.lr is None else rule.lr
        decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        if parameters:
            groups.append({"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return groups


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's base rate by ``factor``; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def counts_steps_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the number of steps is in ``param_groups`` (NVIDIA apex) and not in each parameter's state (torch)."""
    return type(optimizer).__module__.partition(".")[0] == "apex"


def _apex_adam() -> Any:
    try:
        from apex.optimizers import FusedAdam
    except ImportError:  # PyPI's `apex` is another project and has no such module
        return None
    return FusedAdam
