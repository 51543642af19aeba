"""What of a model stays as it is: no optimiser moves it and no checkpoint holds it, so that a checkpoint of adapters is
as small as they are.  A checkpoint notes what tells it from others instead, and is loaded onto nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from gr.errors import UserError
from gr.modality.digest import Sketch, digest_of
from gr.models.model import Model


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
    table, the sketch of those that a file has."""
    sketches = {name: table.sketch() for name, table in model.tables.items()}
    return {
        "frozen": frozen_digest(model),
        "encoders": {name: said for name, table in model.tables.items() if (said := table.outside_digest())},
        "vectors": {name: asdict(sketch) for name, sketch in sketches.items() if sketch is not None},
    }


def check_noted(what: str, said: Mapping[str, Any], model: Model) -> None:
    """Refuse to load trained weights onto others than those that they were trained on.  what: what people call that
    which has ``said`` so (:func:`noted`); every process calls this together."""
    for name, fields in said.get("vectors", {}).items():
        before = Sketch(**fields)
        now = model.tables[name].sketch(before.rows) if name in model.tables else None
        if now is not None and now.differs(before):
            raise UserError(
                f"{what} was trained with other vectors than '{now.file}' has now: bring back the file that it began "
                "with, encode the items again with that encoder, or start a new run",
                everywhere=True,
            )
    digest = said.get("frozen", "")
    if digest and digest != frozen_digest(model):
        raise UserError(
            f"{what} was trained onto frozen weights that are others now: bring back the encoder and the run of "
            "train.start_from that it began with (train.start_from.checkpoint names a step)"
        )
