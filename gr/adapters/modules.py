"""What an adapter is made of.  What each of them adds starts from zero (gr.adapters.insert fills them).

Shapes: E width of what is adapted, R of a bottleneck, n texts, L tokens, O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.errors import UserError

RULES = 4


class Bottleneck(nn.Module):
    """up(gelu(down(x))): I -> R -> O."""

    def __init__(self, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inputs, size), nn.Linear(size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


class Hypercomplex(nn.Module):
    """y = x W + b, W = sum_i rule_i (x) left_i right_i^T: Kronecker products of ``rule`` (4, 4, 4), which all layers
    of a network share, with matrices of rank 1."""

    def __init__(self, inputs: int, outputs: int, rule: nn.Parameter) -> None:
        super().__init__()
        parts = len(rule)
        if inputs % parts or outputs % parts:
            raise UserError(
                f"adapters compacter cut {inputs} and {outputs} numbers into {parts} parts: choose a size that {parts} "
                "divides"
            )
        self.rule = rule
        self.left = nn.Parameter(torch.empty(parts, inputs // parts))
        self.right = nn.Parameter(torch.empty(parts, outputs // parts))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("pab,pi,pj->aibj", self.rule, self.left, self.right)
        return x @ weight.reshape(x.shape[-1], -1) + self.bias


class HypercomplexBottleneck(nn.Module):
    """up(gelu(down(x))) of hypercomplex layers."""

    def __init__(self, inputs: int, size: int, outputs: int, rule: nn.Parameter) -> None:
        super().__init__()
        self.down, self.up = Hypercomplex(inputs, size, rule), Hypercomplex(size, outputs, rule)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


class LowRank(nn.Module):
    """up(down(x)): I -> R -> O."""

    def __init__(self, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, size, bias=False)
        self.up = nn.Linear(size, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def product(self) -> Tensor:
        """(O, I): what it adds to a weight."""
        return self.up.weight @ self.down.weight


class LowRankRows(nn.Module):
    """What low ranks add to some rows of a weight (O, I): a :class:`LowRank` for each of ``parts``, named ranges."""

    def __init__(self, weight: Tensor, parts: Mapping[str, range], size: int) -> None:
        super().__init__()
        (self.outputs, inputs), self.rows = weight.shape, dict(parts)
        self.parts = nn.ModuleDict({name: LowRank(inputs, size, len(rows)) for name, rows in parts.items()})

    def forward(self) -> Tensor:
        """(O, I); zeros in the rows of no part."""
        products = ((part.product(), self.rows[name]) for name, part in self.parts.items())  # type: ignore[operator]
        padded = [F.pad(product, (0, 0, rows.start, self.outputs - rows.stop)) for product, rows in products]
        return torch.stack(padded).sum(0)


class Side(nn.Module):
    """Beside blocks 0 .. n-1: s_i = s_{i-1} + bottleneck_i(h_i + s_{i-1}), where h_i is what block i gives; h + s of
    the last one goes on.  No gradient of it goes through a block."""

    def __init__(self, width: int, size: int, blocks: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Bottleneck(width, size, width) for _ in range(blocks))

    def forward(self, block: int, hidden: Tensor, state: Tensor | None) -> Tensor:
        """s of ``block``; ``state``: of the block before."""
        x = hidden if state is None else hidden + state
        added = self.steps[block](x)
        return added if state is None else state + added


class Prompt(nn.Module):
    """Learned vectors of so many tokens, which stand before every text or behind every picture."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(size, width))

    def before(self, words_nLE: Tensor, mask_nL: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors and mask with the prompt's in front."""
        return torch.cat([self._like(words_nLE), words_nLE], dim=1), F.pad(
            mask_nL, (len(self.vectors), 0), value=1
        )

    def behind(self, patches_nLE: Tensor) -> Tensor:
        """Vectors with the prompt's behind them."""
        return torch.cat([patches_nLE, self._like(patches_nLE)], dim=1)

    def _like(self, words_nLE: Tensor) -> Tensor:
        return self.vectors.to(words_nLE.dtype).expand(len(words_nLE), -1, -1)
