"""DistributedDataParallel around the dense part: gradients are exchanged while the backward pass runs."""

# not from __future__ import annotations: DDP looks at what its hook's annotations are, and refuses their text
import contextlib
import inspect
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gr.config import ComponentConfig
from gr.models.model import Model
from gr.train.engines.engine import Engine

# torch 2.13 has another name for it, and warns of the old one
_NAMES = inspect.signature(DistributedDataParallel.__init__).parameters
SAME_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class DDP(Engine):
    class Config(ComponentConfig):
        name: Literal["ddp"] = "ddp"

    shares_sequences = freezes = True

    def wrap(self, model: Model) -> nn.Module:
        world = self.processes.world  # along either axis, gradients are parts of one sum
        if world.size == 1 or not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        # Looking for unused parameters keeps DDP from rebuilding its buckets after the first step: with other
        # buckets a ring of three or more ranks adds in another order, and a resumed run would lose its bits.
        # (Two ranks add a and b either way.)
        wrapped = DistributedDataParallel(
            model,
            process_group=world.group,
            find_unused_parameters=world.size > 2,
            gradient_as_bucket_view=True,
            **SAME_BUFFERS,
        )
        wrapped.register_comm_hook(world.group, _sum)
        return wrapped

    def accumulating(self, last: bool) -> AbstractContextManager:
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def exchange(self) -> None:
        """DDP has done it for the module."""
        self.exchange_tables()


def _sum(group, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    """DDP's exchange of a bucket, as the sum and not the mean."""
    buffer = bucket.buffer()
    if buffer.is_cuda:
        work = dist.all_reduce(buffer, group=group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])
    # On CPUs at once: a callback of Python would be run and forgotten by a thread of gloo's, which ends a process with
    # SIGABRT where the interpreter is on its way out.
    dist.all_reduce(buffer, group=group)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done
