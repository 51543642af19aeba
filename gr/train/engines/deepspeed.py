"""DeepSpeed's ZeRO around the dense part: processes share out moments (1), gradients too (2), parameters too (3)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gr.config import COUNT, ComponentConfig
from gr.models.model import Model
from gr.models.step import StepContext
from gr.train.engines.dense import Dense
from gr.train.engines.engine import Engine
from gr.train.engines.zero import Zero
from gr.train.host_copy import HostCopy


class DeepSpeed(Engine):
    class Config(ComponentConfig):
        """zero: what is shared.  whole_below: parameters of fewer numbers stay whole on every process (zero 3)."""

        name: Literal["deepspeed"] = "deepspeed"
        zero: Annotated[int, Field(ge=1, le=3)] = 2
        whole_below: COUNT = 100_000

        def idle(self) -> dict[str, str]:
            return {} if self.zero == 3 else {"whole_below": f"zero is {self.zero}"}

    config: Config

    def wrap(self, model: Model) -> nn.Module:
        several = self.processes.world.size > 1
        self.collective = several and self.config.zero > 1  # each backward pass shares out its gradients
        model.lockstep = several and self.config.zero == 3
        # inside of DeepSpeed, which switches an outer autocast off on GPUs; its own bf16 casts parameters
        return InBfloat16(model, self.processes.device) if self.bf16 else model

    def divide(self, optimizer: Any) -> list[Dense]:
        self.zero = Zero(
            dict(self.model.named_parameters()),
            optimizer,
            self.processes,
            module=self.module,
            stage=self.config.zero,
            clip_norm=self.clip_norm,
            whole_below=self.config.whole_below,
        )
        return [self.zero, *self.tables_apart(optimizer)]

    def forward_backward(self, micro_batches: Sequence[Any], context: StepContext, targets: int) -> HostCopy:
        self.zero.started()
        return super().forward_backward(micro_batches, context, targets)

    def accumulating(self, last: bool) -> AbstractContextManager:
        self.zero.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def loss(self, micro_batch: Any, context: StepContext) -> Tensor:
        return self.zero.engine(micro_batch, context)

    def backward(self, loss: Tensor) -> None:
        self.zero.engine.backward(loss)

    def exchange(self) -> None:
        """DeepSpeed has done it for the module."""
        self.exchange_tables()


class InBfloat16(nn.Module):
    """A model that computes in bfloat16 by autocast; its parameters stay float32."""

    def __init__(self, model: Model, device: torch.device) -> None:
        super().__init__()
        self.model, self.device_type = model, device.type

    def forward(self, part: Any, context: StepContext) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16):
            return self.model(part, context)
