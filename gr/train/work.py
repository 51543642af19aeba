"""The work of a run's steps: operations and real tokens, and how they compare with what the devices could do.

Shapes: B sequences of a process's share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gr.config import RunConfig
from gr.modality.tower import Tower
from gr.models.model import Model
from gr.processes import Processes
from gr.scaling.ceiling import data_sheet, measured
from gr.scaling.families import ModelAccounting
from gr.scaling.towers import TowerWork

PFLOP_DAY = 1e15 * 86400


@dataclass(frozen=True)
class Done:
    """Of a step or of many, all processes together.  flops: the model's operations on real tokens.  padded: as they
    would be if every sequence were as long as the longest of its share."""

    flops: int = 0
    padded: int = 0
    tokens: int = 0


class Work:
    """What steps of ``model`` are made of.  Counts are whole numbers, the same for any number of processes."""

    def __init__(self, model: Model, config: RunConfig, processes: Processes) -> None:
        self.account, self.processes = ModelAccounting(model, config), processes
        self.towers = [TowerWork(table) for table in model.tables.values() if isinstance(table, Tower)]
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32

    def own(self, lengths_B: Sequence[int], targets: int) -> list[int]:
        """(flops, padded, tokens) of this process, without the loss, whose candidates are the global batch's.  targets:
        this process's.  Where processes share sequences the first of them counts their rows."""
        mine = lengths_B if self.processes.context.rank == 0 else []
        padded = [max(mine, default=0)] * len(mine)
        real, more = (self.account.step(lengths, targets).without("loss") for lengths in (mine, padded))
        return [round(real), round(more), self.account.tokens(mine)]

    def done(self, sums: Sequence[int], targets: int) -> Done:
        """From everybody's sums, and the targets of the global batch; after the step's gradients, when an encoder of
        items knows what it has encoded (all processes together)."""
        loss = round(self.account.loss(targets))
        flops, padded, tokens = sums
        for tower in self.towers:
            found, longest = tower.last()
            flops, padded = flops + round(found), padded + round(longest)
        return Done(flops + loss, padded + loss, tokens)

    def rates(self, flops_per_s: float, padded_per_s: float) -> dict[str, float]:
        """TFLOP/s, and MFU against what a product reaches in this process and, of a known GPU, its data sheet."""
        devices, device = self.processes.world.size, self.processes.device
        ceiling = devices * measured(device, self.dtype)
        found = {
            "tflops": round(flops_per_s / 1e12, 6),
            "mfu": round(flops_per_s / ceiling, 4),
            "mfu_padded": round(padded_per_s / ceiling, 4),
        }
        if (sheet := data_sheet(device, self.dtype)) is not None:
            found["mfu_data_sheet"] = round(flops_per_s / (devices * sheet), 4)
        return found


def said(rates: dict[str, float], flops: int) -> str:
    """Of rates, and of all operations so far, for the line that a person watches."""
    share = f"MFU {rates['mfu']:.1%}"
    if "mfu_data_sheet" in rates:
        share += f" ({rates['mfu_data_sheet']:.1%} of the data sheet)"
    text = f"{rates['tflops']:.3g} TFLOP/s, {share}, {rates['mfu_padded']:.1%} with padding"
    return f"{text}, {flops / PFLOP_DAY:.3g} PFLOP-days"
