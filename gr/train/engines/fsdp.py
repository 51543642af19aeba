"""PyTorch's fully_shard around the dense part: each process keeps a shard of every parameter, its gradient and moments;
a layer is gathered while it computes.  State leaves and enters as DTensors, under everybody's names."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from gr.config import ComponentConfig
from gr.models.model import Model
from gr.models.step import StepContext
from gr.train.engines.dense import Dense
from gr.train.engines.engine import Engine


class FSDP(Engine):
    """With one process there is nothing to share: the model as it is."""

    class Config(ComponentConfig):
        name: Literal["fsdp"] = "fsdp"

    def wrap(self, model: Model) -> nn.Module:
        world = self.processes.world  # along either axis, gradients are parts of one sum
        if world.size == 1:
            return model
        self.collective = model.lockstep = True
        mesh = DeviceMesh.from_group(world.group, self.processes.device.type)
        for stack in model.stacks():
            for layer in stack:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # sums over processes, not means: exchanges add, and nothing is divided
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        # a share that has no use for a parameter still takes part in its exchange
        model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
        for method in model.entrances:
            register_fsdp_forward_method(model, method)
        model.register_forward_pre_hook(lambda model, arguments: arguments[0].arguments)
        return model

    def divide(self, optimizer: Any) -> list[Dense]:
        """Shards apart from whole tables: torch doesn't take both in one list."""
        if self.processes.world.size == 1:
            return super().divide(optimizer)
        shards = Dense(dict(self.model.named_parameters()), optimizer.dense, self.processes.world)
        return [shards, *self.tables_apart(optimizer)]

    def accumulating(self, last: bool) -> AbstractContextManager:
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def loss(self, micro_batch: Any, context: StepContext) -> Tensor:
        if not isinstance(self.module, FSDPModule):
            return super().loss(micro_batch, context)
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.bf16):
            return self.module(_Unseen(micro_batch, context))

    def exchange(self) -> None:
        """fully_shard has done it for the module."""
        self.exchange_tables()


class _Unseen:
    """Arguments into which fully_shard doesn't look: it would put a node of its own before every tensor in them that
    has a gradient, views of tables and the exchange that brought them included."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
