"""The plain engine: one all-reduce of all dense gradients after the backward pass, nothing wrapped, nothing hidden."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

from gr.config import ComponentConfig
from gr.models.model import Model
from gr.train.engines.engine import Engine


class AllReduce(Engine):
    class Config(ComponentConfig):
        name: Literal["all_reduce"] = "all_reduce"

    shares_sequences = freezes = True

    def wrap(self, model: Model) -> nn.Module:
        return model

    def accumulating(self, last: bool) -> AbstractContextManager:
        return contextlib.nullcontext()

    def exchange(self) -> None:
        world = self.processes.world  # along either axis, gradients are parts of one sum
        if world.size == 1:
            return
        gradients = []
        for name, part in self.dense.items():
            parameter = part.parameters[name]
            if parameter.grad is None:  # this process's share had no use for it
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        world.add_up(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))
