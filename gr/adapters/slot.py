"""Where an adapter may stand in a network of ours.  (Those of other packages have their places found by name.)"""

from __future__ import annotations

from torch import Tensor, nn


class Slot(nn.Module):
    """After a sublayer; without an adapter what that gives goes on as it is.

    outputs: the width of what it gives, inputs: of what it was given, where both may be added up.  residual: whether
    the latter is in the former already.
    """

    def __init__(self, outputs: int, inputs: int | None = None, residual: bool = False) -> None:
        super().__init__()
        self.outputs, self.inputs, self.residual = outputs, inputs, residual
        self.adapter: nn.Module | None = None
        self.beside = False
        """Whether the adapter reads what the sublayer was given, and not what it gives."""

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        if self.adapter is None:
            return output
        if self.beside:
            return output + self.adapter(x)
        return output + self.adapter(output - x if self.residual else output)
