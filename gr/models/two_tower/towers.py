"""Networks of two towers, which meet at their tops alone: an item's side is computed once, for all users.

DSSM (Huang et al., CIKM 2013), DAT (Yu et al., "A Dual Augmented Two-tower Model", DLP-KDD 2021), IntTower (Li et al.,
arXiv 2210.09890).

Shapes: S impressions of this process, G of all, U users or V items of them that differ, W width of the towers' tops, H
heads of a user's layer, J of an item, K width of a head, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gr.batch import Jagged
from gr.config import FRACTION, POSITIVE, ComponentConfig
from gr.embeddings.table import TableSpec
from gr.embeddings.view import View
from gr.errors import UserError, nearest
from gr.models import init
from gr.models.layers import Linear
from gr.models.two_tower.contrast import contrast
from gr.models.two_tower.exchange import first_row, gathered
from gr.models.two_tower.fe_block import max_similarity
from gr.models.two_tower.fields import Looked
from gr.models.two_tower.joint import STD, WIDTHS
from gr.models.two_tower.layers import LightSE, Tower
from gr.models.two_tower.network import Bias, Network, Pairs, Shape
from gr.processes import Axis
from gr_kernels.counter_random import derive_key
from gr_kernels.tracing import with_numbers

WEIGHT = Annotated[float, Field(ge=0)]


class Towers(Network):
    """Two towers of [Linear, BatchNorm, ReLU, Dropout].  ``top(side, ...)``: what an impression's score needs of a
    side; ``score``: of pairs of them."""

    class Config(ComponentConfig):
        """tower: widths of both towers' layers.  std: of their first weights."""

        tower: WIDTHS = [300, 300, 128]
        dropout: FRACTION = 0.3
        std: STD = 1e-4

    exchanges = True
    whole_batches = True

    def __init__(self, config: Any, user: Shape, item: Shape, dim: int, axis: Axis) -> None:
        super().__init__(config, user, item, dim, axis)
        self.axis = axis
        widths = {"user": user.flat(dim), "item": item.flat(dim)}
        self.towers = nn.ModuleDict(
            {
                side: Tower(width + self.more(config), config.tower, config.dropout, config.std, axis)
                for side, width in widths.items()
            }
        )
        self.bias = Bias()

    def more(self, config: Any) -> int:
        """Numbers that a tower reads beside its fields'."""
        return 0

    def layers(self, side: str, x_SE: Tensor, key: int) -> tuple[list[Tensor], Tensor | None]:
        """(U, W) of each layer of a tower, for the rows that differ, and which of these each of the S rows is (None:
        the one in its place).  An evaluation asks about few users and items many times; in training a layer normalises
        over all rows."""
        of_S = None
        if not (self.training or torch.is_grad_enabled()):
            x_SE, of_S = x_SE.unique(dim=0, return_inverse=True)
        return self.towers[side].layers(x_SE, derive_key(key, side)), of_S  # type: ignore[operator,union-attr]


class DSSM(Towers):
    """``scale``: the log-odds are scale times the cosine of the tops."""

    class Config(Towers.Config):
        name: Literal["dssm"] = "dssm"
        scale: STD = 10.0

    def __init__(self, config: Any, user: Shape, item: Shape, dim: int, axis: Axis) -> None:
        super().__init__(config, user, item, dim, axis)
        self.scale = config.scale

    def top(self, side: str, flat_SE: Tensor, key: int) -> Tensor:
        """(S, W)."""
        layers, of_S = self.layers(side, flat_SE, key)
        return _each(layers[-1], of_S)

    def score(self, user_SW: Tensor, item_SW: Tensor) -> Tensor:
        """(S,)."""
        return self.bias(self.scale * F.cosine_similarity(user_SW, item_SW, dim=1))

    def forward(self, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        user_SW = self.top("user", pairs.user.flat, pairs.key)
        item_SW = self.top("item", pairs.item.flat, pairs.key)
        return self.score(user_SW, item_SW), None


class DAT(DSSM):
    """A DSSM whose towers also read an augmented vector of their user, or item, which is drawn to the tops of the items
    that the user liked, or of the users that liked the item: sum over likes of |a_u - p_v|^2 + |a_v - p_u|^2, the
    tops p held still.  (Its alignment of covariances is for catalogues of several kinds of items, and left out.)

    user_field, item_field: whose rows augmented vectors belong to.  mimic: weight of the loss above, a mean over W."""

    class Config(Towers.Config):
        name: Literal["dat"] = "dat"
        scale: STD = 10.0
        user_field: str = "user"
        item_field: str = "item"
        mimic: WEIGHT = 0.1

    def __init__(self, config: Any, user: Shape, item: Shape, dim: int, axis: Axis) -> None:
        super().__init__(config, user, item, dim, axis)
        self.width, self.mimic = config.tower[-1], config.mimic
        self.augmented: dict[str, tuple[str, int]] = {}
        for side, shape, field in (("user", user, config.user_field), ("item", item, config.item_field)):
            self.augmented[side] = (field, _rows_of(field, side, shape))

    def more(self, config: Any) -> int:
        return config.tower[-1]

    def tables_beside(self, like: TableSpec) -> list[TableSpec]:
        return [
            replace(like, name=f"augmented-{side}", rows=rows, dim=self.width, bias=False)
            for side, (_, rows) in self.augmented.items()
        ]

    def wanted_beside(self, rows: Mapping[str, Tensor | Jagged]) -> dict[str, list[Tensor]]:
        return {f"augmented-{side}": [_one(rows, field)] for side, (field, _) in self.augmented.items()}

    def augmented_vectors(
        self, side: str, rows: Mapping[str, Tensor | Jagged], views: Mapping[str, View]
    ) -> Tensor:
        """(S, W)."""
        return views[f"augmented-{side}"].lookup(_one(rows, self.augmented[side][0]))

    def forward(self, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        augmented = {side: self.augmented_vectors(side, pairs.rows, pairs.views) for side in self.augmented}
        tops = {
            side: self.top(side, torch.cat([looked.flat, augmented[side]], dim=1), pairs.key)
            for side, looked in (("user", pairs.user), ("item", pairs.item))
        }
        logits_S = self.score(tops["user"], tops["item"])
        if pairs.labels_S is None:
            return logits_S, None
        far_S = sum(
            (augmented[side] - tops[other].detach()).square().mean(1)
            for side, other in (("user", "item"), ("item", "user"))
        )
        return logits_S, self.mimic * (far_S * (pairs.labels_S == 1)).sum()


class IntTower(Towers):
    """Light-SE, towers, and heads of each layer of the user's tower that meet an item's heads by MaxSim:
    s = sum over layers i and heads h of max_j <M_u^i[h], M_v[j]> (FE-Block).

    CIR: for each like the InfoNCE loss of its user's top with the item's, against the items of all impressions of the
    global batch but those of the same item and the user's own likes:
    L = L_ctr + cir * sum over likes of -log(exp(u.v/t) / sum over candidates of exp(u.v'/t)), tops L2-normalised.  (The
    released code indexes its columns by the label and never adds the loss.)

    light_se, layers: what ablations take away; layers: of the user's tower from the top, all without it.
    user_field: who the user is, for CIR.
    """

    class Config(Towers.Config):
        name: Literal["inttower"] = "inttower"
        heads: POSITIVE = 32
        item_heads: POSITIVE = 32
        head_dim: POSITIVE = 64
        light_se: bool = True
        layers: POSITIVE | None = None
        cir: WEIGHT = 0.1
        temperature: STD = 0.1
        user_field: str = "user"

        def idle(self) -> dict[str, str]:
            return {} if self.cir else dict.fromkeys(("temperature", "user_field"), "cir is 0")

    def __init__(self, config: Any, user: Shape, item: Shape, dim: int, axis: Axis) -> None:
        super().__init__(config, user, item, dim, axis)
        self.config = config
        if config.layers is not None and config.layers > len(config.tower):
            raise UserError(
                f"config key 'model.network.layers' is {config.layers}, and the towers have {len(config.tower)} "
                "layers: give no more than these"
            )
        if config.cir:
            _rows_of(config.user_field, "user", user)
        self.used = config.tower[-(config.layers or len(config.tower)) :]
        wide = config.heads * config.head_dim
        self.user_heads = nn.ModuleList(Linear(w, wide, init.uniform(w**-0.5)) for w in self.used)
        top = config.tower[-1]
        self.item_heads = Linear(top, config.item_heads * config.head_dim, init.uniform(top**-0.5))
        if config.light_se:
            self.user_se, self.item_se = LightSE(user.fields), LightSE(item.fields)

    def user_side(self, user: Looked, key: int = 0) -> Tensor:
        """(S, L H, K) the heads, the layers' one after another from the lowest used."""
        layers, of_S = self._layers("user", user, key)
        each = [heads(x_UW) for heads, x_UW in zip(self.user_heads, layers[-len(self.used) :], strict=True)]
        return _each(torch.cat(each, dim=1).unflatten(1, (-1, self.config.head_dim)), of_S)

    def item_side(self, item: Looked, key: int = 0) -> Tensor:
        """(S, J, K) the heads."""
        layers, of_S = self._layers("item", item, key)
        return _each(self._item_heads(layers[-1]), of_S)

    def forward(self, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        of_user, user_S = self._layers("user", pairs.user, pairs.key)
        of_item, item_S = self._layers("item", pairs.item, pairs.key)
        used = zip(of_user[-len(self.used) :], self.user_heads, strict=True)
        heads = [(x_UW, heads.adapted, heads.bias) for x_UW, heads in used]
        meeting = None if user_S is None or item_S is None else (user_S, item_S)
        logits_S = self.bias(max_similarity(heads, self._item_heads(of_item[-1]), meeting))  # type: ignore[arg-type]
        if pairs.labels_S is None or not self.config.cir:
            return logits_S, None
        users_S = _one(pairs.rows, self.config.user_field)
        tops = _each(of_user[-1], user_S), _each(of_item[-1], item_S)
        return logits_S, self.config.cir * self._contrast(*tops, users_S, pairs)

    def _item_heads(self, top_VW: Tensor) -> Tensor:
        """(V, J, K)."""
        return self.item_heads(top_VW).unflatten(1, (-1, self.config.head_dim))

    def _layers(self, side: str, looked: Looked, key: int) -> tuple[list[Tensor], Tensor | None]:
        if self.config.light_se:
            block = self.user_se if side == "user" else self.item_se
            looked = replace(looked, vectors_SFD=block(looked.vectors_SFD))
        return self.layers(side, looked.flat, key)

    def _contrast(self, user_SW: Tensor, item_SW: Tensor, users_S: Tensor, pairs: Pairs) -> Tensor:
        """The sum over this process's likes, N of its impressions, of their InfoNCE losses."""
        assert pairs.labels_S is not None
        with with_numbers():
            liked_S = pairs.labels_S == 1
            like_N = liked_S.nonzero()[:, 0]
        item_GW = gathered(F.normalize(item_SW, dim=1), self.axis)
        items_G, fans_G = (self.axis.gather(x) for x in (pairs.items_S, users_S.where(liked_S, -1)))
        # neither the liked item itself nor the user's other likes are to be kept away from (what others were shown
        # counts, though it be one of these)
        same = [(pairs.items_S[like_N], items_G), (users_S[like_N], fans_G)]
        own_N = like_N + first_row(len(item_SW), self.axis)
        return contrast(F.normalize(user_SW[like_N], dim=1), item_GW, own_N, same, self.config.temperature)


def _rows_of(field: str, side: str, shape: Shape) -> int:
    """Rows of the table of the field that says who, or what, an impression is about."""
    if field not in shape.rows:
        raise UserError(
            f"config key 'model.network.{side}_field' is '{field}', which is no field of model.{side} with one value "
            f"each: {nearest(field, shape.rows)}"
        )
    return shape.rows[field]


def _one(rows: Mapping[str, Tensor | Jagged], field: str) -> Tensor:
    found = rows[field]
    assert isinstance(found, Tensor)
    return found


def _each(x_UW: Tensor, of_S: Tensor | None) -> Tensor:
    """Of each of the S rows what belongs to it (see Towers.layers)."""
    return x_UW if of_S is None else x_UW[of_S]
