"""DIN: deep interest network (Zhou et al., KDD 2018, arXiv 1706.06978).

Each action of a user's past is weighed by an MLP of it and the candidate (activation unit, figure 2): no softmax, the
weights need not add up to 1.  The weighed sum, the candidate and what is known of the request go into an MLP, a logit a
task.

Two things are done so that a row's answer hangs on no other row of the batch, and a loss on no micro-batch:

- Dice (equation 3) takes mean and variance over the units of a layer instead of over the batch;
- the mini-batch-aware regularisation is that of equation 5, a sum over samples: of each item of a sample
  l2 |w|^2 / (2 n), n being how often training has the item, and not equation 6's upper bound on it, which has to know
  what else is in a batch.

Shapes: A actions of the batch, S candidates, P pairs, K tasks, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gr.config import POSITIVE, RunConfig
from gr.embeddings.view import View
from gr.models import init
from gr.models.dropout import Dropout
from gr.models.features import vectors_of
from gr.models.histories import Histories, OfHistories
from gr.models.init import initialise
from gr.models.layers import Linear
from gr.models.model import Catalogue
from gr.models.ranking import HistoryLabels
from gr.models.step import StepContext
from gr.processes import Processes
from gr_kernels.counter_random import derive_key

EPS = 1e-8


class DIN(OfHistories):
    class Config(OfHistories.Config):
        """attention, hidden: widths of the layers of the activation unit and of the last MLP.  activation: of both.
        l2: of the items, see above."""

        name: Literal["din"] = "din"
        attention: Annotated[list[POSITIVE], Field(min_length=1)] = [36]
        hidden: Annotated[list[POSITIVE], Field(min_length=1)] = [200, 80]
        activation: Literal["dice", "prelu"] = "dice"
        l2: Annotated[float, Field(ge=0)] = 0.0

    def __init__(
        self, config: Config, run: RunConfig, catalogue: Catalogue, processes: Processes | None = None
    ) -> None:
        super().__init__(config, run, catalogue, processes)
        tasks, requests = len(self.labels.names), self.features.of_requests
        self.l2 = config.l2
        self.counts_I = catalogue.training_counts.clamp_min(1) if config.l2 else None
        self.history = HistoryLabels(tasks, config.dim, config.table_std)
        self.unit = MLP([4 * config.dim, *config.attention], 1, config.activation, 0.0, "unit")
        widths = [(3 + len(requests)) * config.dim, *config.hidden]
        self.head = MLP(widths, tasks, config.activation, config.hidden_dropout, "head")
        initialise(self, run.train.seed)

    def logits_of(self, part: Histories, views: Mapping[str, View]) -> Tensor:
        items_AD = self.of_items(part, views)
        past_AD = self.of_past(part, items_AD, views) + self.history(part.labels_AK)
        candidates_SD = items_AD.index_select(0, part.targets_S_in_A)
        weights_P = self._weights(past_AD, candidates_SD, part)
        interest_SD = F.embedding_bag(
            part.pairs_P,
            past_AD,
            part.offsets_S1,
            mode="sum",
            per_sample_weights=weights_P,
            include_last_offset=True,
        )
        known = [vectors_of(one, views[name]) for name, one in self.of_requests(part).items()]
        both = [interest_SD, candidates_SD, interest_SD * candidates_SD, *known]
        return self.head(torch.cat(both, dim=1), part.dropout_key)

    def _weights(self, past_AD: Tensor, candidates_SD: Tensor, part: Histories) -> Tensor:
        """(P,) of each pair: the MLP of [h, e, h - e, h * e].  What its first layer makes of h and of e is found once
        for each, and of the pair alone what it makes of h * e."""
        layer = self.unit.layers[0]
        assert isinstance(layer, Linear)
        of_h, of_e, of_difference, of_product = layer.weight.chunk(4, dim=1)
        past_AE = F.linear(past_AD, of_h + of_difference, layer.bias)
        own_SE = F.linear(candidates_SD, of_e - of_difference)
        pairs_P, owners_P = part.pairs_P, part.owners_P
        both_PD = past_AD.index_select(0, pairs_P) * candidates_SD.index_select(0, owners_P)
        first_PE = past_AE.index_select(0, pairs_P) + own_SE.index_select(0, owners_P)
        first_PE = first_PE + F.linear(both_PD, of_product)
        return self.unit.after_first(first_PE, part.dropout_key).squeeze(1)

    def forward(self, part: Histories, context: StepContext) -> Tensor:
        loss = super().forward(part, context)
        if self.counts_I is None:
            return loss
        if self.counts_I.device != part.items_A.device:
            self.counts_I = self.counts_I.to(part.items_A.device)
        squares_A = context.views["items"].lookup(part.items_A).square().sum(1)
        return loss + self.l2 / 2 * (squares_A / self.counts_I[part.items_A]).sum()


class MLP(nn.Module):
    """Linear layers with an activation after each but the last.  widths: of the input and of the inner layers.  name:
    on which the draws of dropout hang."""

    def __init__(
        self, widths: Sequence[int], outputs: int, activation: str, dropout: float, name: str
    ) -> None:
        super().__init__()
        self.name = name
        self.layers = nn.ModuleList(Linear(i, o, init.xavier_uniform) for i, o in zip(widths, widths[1:]))
        kinds: dict[str, type[nn.Module]] = {"dice": Dice, "prelu": PReLU, "relu": ReLU}
        self.activations = nn.ModuleList(kinds[activation](width) for width in widths[1:])
        self.out = Linear(widths[-1], outputs, init.xavier_uniform)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, dropout_key: int) -> Tensor:
        """(N, inputs) -> (N, outputs)."""
        return self.after_first(self.layers[0](x), dropout_key)

    def after_first(self, x: Tensor, dropout_key: int) -> Tensor:
        """The same of what the first layer gave."""
        for number, activation in enumerate(self.activations):
            x = self.layers[number](x) if number else x
            x = self.dropout(activation(x), derive_key(dropout_key, self.name, number))
        return self.out(x)


class Dice(nn.Module):
    """p x + (1 - p) a x, p = sigmoid((x - mean) / sqrt(variance + eps)) over the units of a row; a learned, from 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(width))

    def initialisers(self) -> dict[str, init.Initialiser]:
        return {"alpha": init.zeros}

    def forward(self, x: Tensor) -> Tensor:
        gate = F.layer_norm(x, x.shape[-1:], eps=EPS).sigmoid()
        return gate * x + (1 - gate) * self.alpha * x


class PReLU(nn.Module):
    """max(x, 0) + a min(x, 0), a learned, from 1/4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(width))

    def initialisers(self) -> dict[str, init.Initialiser]:
        return {"alpha": lambda tensor, generator: nn.init.constant_(tensor, 0.25)}

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.alpha)


class ReLU(nn.ReLU):
    def __init__(self, width: int) -> None:
        super().__init__()
