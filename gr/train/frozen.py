"""What of a model stays as it is: no optimiser moves it and no checkpoint holds it, so that a checkpoint of adapters is
as small as they are.  A checkpoint keeps its digest instead, and is loaded onto nothing else.
"""

from __future__ import annotations

from torch import nn

from gr.modality.digest import digest_of
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
