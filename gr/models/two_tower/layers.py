"""Layers of pre-ranking networks.

Shapes: S impressions, F fields, D width of a field's vector, E numbers of a row, W width of a layer, H heads,
K width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.models import init
from gr.models.dropout import Dropout
from gr.models.layers import Linear
from gr.models.two_tower.exchange import summed
from gr.processes import Axis
from gr_kernels.counter_random import derive_key

MOMENTUM, EPS = 0.1, 1e-5


def tiny(inputs: int, outputs: int, std: float) -> Linear:
    """A linear layer as the published code starts them: weights from N(0, std^2), biases uniform within
    +-1/sqrt(inputs)."""
    return Linear(inputs, outputs, init.normal(std), init.uniform(1 / math.sqrt(max(inputs, 1))))


class BatchNorm(nn.Module):
    """Batch normalisation over the rows of all processes (Ioffe and Szegedy, arXiv 1502.03167), so that their number
    changes nothing; in evaluation by running means, which checkpoints keep.

    The formula is torch's (variances over n, running ones over n - 1), which is what one process calls."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def initialisers(self) -> dict[str, init.Initialiser]:
        return {"weight": init.ones, "bias": init.zeros}

    def forward(self, x_SW: Tensor) -> Tensor:
        """(S, W) -> (S, W), in at least float32."""
        x_SW = x_SW if x_SW.dtype == torch.float64 else x_SW.float()
        if not self.training or (self.axis.size == 1 and len(x_SW) > 1):
            running = (self.running_mean, self.running_var)
            return F.batch_norm(x_SW, *running, self.weight, self.bias, self.training, MOMENTUM, EPS)
        (rows,) = self.axis.sum([len(x_SW)])
        mean_W = summed(x_SW.sum(0), self.axis) / max(rows, 1)
        centred_SW = x_SW - mean_W
        variance_W = summed(centred_SW.square().sum(0), self.axis) / max(rows, 1)
        with torch.no_grad():
            self.running_mean.lerp_(mean_W, MOMENTUM)
            self.running_var.lerp_(variance_W * (rows / max(rows - 1, 1)), MOMENTUM)
        return centred_SW * (torch.rsqrt(variance_W + EPS) * self.weight) + self.bias


class Tower(nn.Module):
    """[Linear, BatchNorm (where ``axis`` is given), ReLU, Dropout] for each of ``widths``."""

    def __init__(
        self, inputs: int, widths: Sequence[int], dropout: float, std: float, axis: Axis | None
    ) -> None:
        super().__init__()
        edges = [inputs, *widths]
        self.linears = nn.ModuleList(tiny(i, o, std) for i, o in zip(edges, edges[1:]))
        self.norms = nn.ModuleList([] if axis is None else [BatchNorm(w, axis) for w in widths])
        self.dropout = Dropout(dropout)

    def layers(self, x_SE: Tensor, key: int) -> list[Tensor]:
        """(S, W) of each layer."""
        found = []
        for number, linear in enumerate(self.linears):
            x_SE = linear(x_SE)
            if len(self.norms):
                x_SE = self.norms[number](x_SE)
            x_SE = self.dropout(F.relu(x_SE), derive_key(key, number))
            found.append(x_SE)
        return found

    def forward(self, x_SE: Tensor, key: int) -> Tensor:
        """(S, W) of the last layer."""
        return self.layers(x_SE, key)[-1]


class LightSE(nn.Module):
    """e'_f = e_f + a_f e_f with a = softmax(W z), z_f the mean of e_f: a field's weight from all fields' means
    (IntTower, arXiv 2210.09890)."""

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.excitation = Linear(fields, fields, init.uniform(1 / math.sqrt(fields)), None)

    def forward(self, vectors_SFD: Tensor) -> Tensor:
        a_SF = self.excitation(vectors_SFD.mean(2)).softmax(1)
        return vectors_SFD + a_SF[:, :, None] * vectors_SFD


class SqueezeExcitation(nn.Module):
    """e'_f = s_f e_f with s = sigmoid(W [e_1 .. e_F] + b) (COLD, arXiv 2007.16122, section 3.2)."""

    def __init__(self, fields: int, dim: int) -> None:
        super().__init__()
        inputs = fields * dim
        self.excitation = Linear(inputs, fields, init.uniform(1 / math.sqrt(inputs)))

    def forward(self, vectors_SFD: Tensor) -> Tensor:
        s_SF = self.excitation(vectors_SFD.flatten(1)).sigmoid()
        return s_SF[:, :, None] * vectors_SFD


class Firsts(nn.Module):
    """The linear part: a weight a category (a table's bias column) and one a number; without a bias of its own."""

    def __init__(self, numbers: int, std: float) -> None:
        super().__init__()
        self.numbers = Linear(numbers, 1, init.normal(std), None) if numbers else None

    def forward(self, firsts_SF: Tensor, numbers_SC: Tensor) -> Tensor:
        """(S, 1)."""
        total_S1 = firsts_SF.sum(1, keepdim=True)
        return total_S1 if self.numbers is None else total_S1 + self.numbers(numbers_SC)


def factorised(vectors_SFD: Tensor) -> Tensor:
    """(S, 1) the sum over pairs of fields of their vectors' products (Rendle 2010), in the time of one field each."""
    square_SD = vectors_SFD.sum(1).square()
    return (square_SD - vectors_SFD.square().sum(1)).sum(1, keepdim=True) / 2


class CrossNet(nn.Module):
    """x_{l+1} = x_0 (x_l . w_l) + b_l + x_l (DCN, arXiv 1708.05123)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, width))
        self.bias = nn.Parameter(torch.empty(layers, width))

    def initialisers(self) -> dict[str, init.Initialiser]:
        # a column each, as xavier_normal would draw it
        return {"weight": init.normal(math.sqrt(2 / (1 + self.weight.shape[1]))), "bias": init.zeros}

    def forward(self, x_SE: Tensor) -> Tensor:
        first_SE = x_SE
        for weight_E, bias_E in zip(self.weight, self.bias):
            x_SE = first_SE * (x_SE @ weight_E)[:, None] + bias_E + x_SE
        return x_SE


class Interacting(nn.Module):
    """Self-attention of an impression's fields, H heads that share D, with a projected residual and ReLU (AutoInt,
    arXiv 1810.11921); not scaled, as in the paper."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inside = Linear(dim, 4 * dim, init.normal(0.05), None)

    def forward(self, vectors_SFD: Tensor) -> Tensor:
        q, k, v, residual = self.inside(vectors_SFD).chunk(4, dim=2)
        q_SHFK, k_SHFK, v_SHFK = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        found_SHFK = F.scaled_dot_product_attention(q_SHFK, k_SHFK, v_SHFK, scale=1.0)
        return F.relu(found_SHFK.transpose(1, 2).flatten(2) + residual)
