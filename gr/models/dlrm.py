"""DLRM-style: embeddings of everything known of a candidate, their inner products, an MLP (Naumov et al., arXiv
1906.00091).

Vectors: the candidate's item, each of its features, each feature of the user and of the moment, the mean of the user's
past items (with what is known since of what was done), for each task the mean of those past items that had its label,
and what a bottom MLP makes of numbers: the past's length (log1p) and the share of each label in it.  The top MLP is
given all pairs' inner products beside that last vector.

Shapes: A actions of the batch, S candidates, P pairs, K tasks, V vectors, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from gr.config import POSITIVE, RunConfig
from gr.embeddings.view import View
from gr.models.din import MLP
from gr.models.features import vectors_of
from gr.models.histories import Histories, OfHistories
from gr.models.init import initialise
from gr.models.model import Catalogue
from gr.processes import Processes


class DLRM(OfHistories):
    class Config(OfHistories.Config):
        """bottom, hidden: widths of the inner layers of the MLP of numbers and of the last one."""

        name: Literal["dlrm"] = "dlrm"
        bottom: Annotated[list[POSITIVE], Field(min_length=1)] = [64]
        hidden: Annotated[list[POSITIVE], Field(min_length=1)] = [128, 64]

    def __init__(
        self, config: Config, run: RunConfig, catalogue: Catalogue, processes: Processes | None = None
    ) -> None:
        super().__init__(config, run, catalogue, processes)
        tasks = len(self.labels.names)
        vectors = 3 + tasks + len(self.features.of_requests) + len(self.features.of_items)
        self.bottom = MLP([1 + 2 * tasks, *config.bottom], config.dim, "relu", 0.0, "bottom")
        widths = [config.dim + vectors * (vectors - 1) // 2, *config.hidden]
        self.head = MLP(widths, tasks, "relu", config.hidden_dropout, "head")
        initialise(self, run.train.seed)

    def logits_of(self, part: Histories, views: Mapping[str, View]) -> Tensor:
        items_AD = views["items"].lookup(part.items_A)
        at_S = part.targets_S_in_A
        known = {name: part.known[name].at(at_S) for name in self.features.of_items}
        known |= self.of_requests(part)
        labels_AK = part.labels_AK.to(items_AD.dtype)
        had_AK, told_AK = (labels_AK == 1).to(items_AD.dtype), (~labels_AK.isnan()).to(items_AD.dtype)
        had_SK, told_SK = (_sums(one, part) for one in (had_AK, told_AK))
        length_S1 = part.offsets_S1.diff()[:, None].to(items_AD.dtype)
        shares_SK = had_SK / told_SK.clamp_min(1)
        numbers_SE = torch.cat([length_S1.log1p(), shares_SK, told_SK.log1p()], dim=1)
        past = [_sums(self.of_past(part, items_AD, views), part) / length_S1.clamp_min(1)]
        for task in range(had_SK.shape[1]):
            count_S1 = had_SK[:, task : task + 1].clamp_min(1)
            past.append(_sums(items_AD * had_AK[:, task : task + 1], part) / count_S1)
        dense_SD = self.bottom(numbers_SE, part.dropout_key)
        vectors = [dense_SD, items_AD.index_select(0, at_S), *past]
        vectors += [vectors_of(one, views[name]) for name, one in known.items()]
        x_SVD = torch.stack(vectors, dim=1)
        products_SVV = x_SVD @ x_SVD.transpose(1, 2)
        i, j = torch.tril_indices(x_SVD.shape[1], x_SVD.shape[1], offset=-1, device=x_SVD.device)
        return self.head(torch.cat([dense_SD, products_SVV[:, i, j]], dim=1), part.dropout_key)


def _sums(rows_AE: Tensor, part: Histories) -> Tensor:
    """(S, E) of each candidate, the sum over the actions before it."""
    return F.embedding_bag(part.pairs_P, rows_AE, part.offsets_S1, mode="sum", include_last_offset=True)
