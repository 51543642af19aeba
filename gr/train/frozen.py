"""What of a model stays as it is: no optimiser moves it and no checkpoint holds it, so that a checkpoint of adapters is
as small as they are.  A checkpoint notes what tells it from others instead, and is loaded onto nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from torch import nn

from gr.errors import UserError
from gr.modality.digest import Sketch, digest_of
from gr.modality.pictures import DIGITS
from gr.models.model import Model

log = logging.getLogger(__name__)
COMES = "than the encoder of model.item_tower comes with now: bring back the files that it began with"
OTHER_SETTINGS = "other settings (its kind, attention heads, activation, ...)"
REFUSED = {
    "tokenizer": f"another tokenizer {COMES}",
    "statistics": f"other running statistics {COMES}",
    "settings": f"{OTHER_SETTINGS} {COMES}",
    "tokens": "other texts of the items than the dataset has now, or other ends of them, by the encoder's files: bring "
    "back the catalogue and the encoder that it began with",
}
"""What else than it was content may not be made of."""


def frozen(model: Model) -> dict[str, nn.Parameter]:
    """The parameters that don't train, by name."""
    return {name: parameter for name, parameter in model.named_whole() if not parameter.requires_grad}


def frozen_digest(model: Model) -> str:
    """32 hexadecimal digits of them, and of encoders whose vectors are formed once; "" where all train."""
    found = frozen(model)
    outside = [f"{name} {said}" for name, table in model.tables.items() if (said := table.outside_digest())]
    if not found and not outside:
        return ""
    return digest_of(found, "".join(outside))


def noted(model: Model) -> dict[str, Any]:
    """What a checkpoint, or an export, says of what it doesn't hold (JSON); every process calls this together.
    frozen: the digest of weights.  encoders: by table, the digest of one whose vectors are formed once.  vectors: by
    table, the sketch of those that a file has.  made_of: by table, digests of what its rows are formed from beside
    weights (:meth:`gr.embeddings.table.Table.made_of`)."""
    sketches = {name: table.sketch() for name, table in model.tables.items()}
    return {
        "frozen": frozen_digest(model),
        "encoders": {name: said for name, table in model.tables.items() if (said := table.outside_digest())},
        "vectors": {name: asdict(sketch) for name, sketch in sketches.items() if sketch is not None},
        "made_of": {name: found for name, table in model.tables.items() if (found := table.made_of())},
    }


def check_noted(what: str, said: Mapping[str, Any], model: Model, *, growing: bool = False) -> None:
    """Refuse to load trained weights onto others than those that they were trained on, or beside what makes other
    content.  what: what people call that which has ``said`` so (:func:`noted`).  growing: the dataset has grown since,
    and may describe its items anew.  Every process calls this together."""
    for name, fields in said.get("vectors", {}).items():
        before = Sketch(**fields)
        now = model.tables[name].sketch(before.rows) if name in model.tables else None
        if now is not None and now.differs(before):
            raise UserError(
                f"{what} was trained with other vectors than '{now.file}' has now: bring back the file that it began "
                "with, encode the items again with that encoder, or start a new run",
                everywhere=True,
            )
    for name, before in said.get("made_of", {}).items():
        if name in model.tables:
            _check_made_of(what, before, model.tables[name].made_of(), growing)
    digest = said.get("frozen", "")
    if digest and digest != frozen_digest(model):
        raise UserError(
            f"{what} was trained onto frozen weights that are others now: bring back the encoder and the run of "
            "train.start_from that it began with (train.start_from.checkpoint names a step)"
        )


def _check_made_of(what: str, before: Mapping[str, str], now: Mapping[str, str], growing: bool) -> None:
    """Refuse what reads items otherwise, and texts that are others; of pictures, which a store gets as time goes by,
    say how many are."""
    others = {kind for kind in before.keys() & now.keys() if before[kind] != now[kind]}
    if growing:
        others -= {"tokens", "pictures"}
    for kind, sentence in REFUSED.items():
        if kind in others:
            raise UserError(f"{what} was trained with {sentence}, or start a new run", everywhere=True)
    if "pictures" in others:
        pairs = list(zip(*(wrap(given["pictures"], DIGITS) for given in (before, now)), strict=False))
        log.warning(
            "%s was trained with other pictures: of %d items that were looked at %d have another one now, which counts",
            what,
            len(pairs),
            sum(one != other for one, other in pairs),
        )
