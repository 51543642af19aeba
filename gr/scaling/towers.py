"""Floating-point operations of item towers: encoders of content, on the distinct items of a step, and what makes a
vector of their result.

Shapes: U items of n tokens each, h the encoder's width, S pixels along a picture's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import Tensor, nn

from gr.errors import UserError
from gr.modes import evaluating
from gr.scaling.flops import Flops, Part, attention, weights_of


def item_tower(
    encoder: nn.Module | None,
    behind: Sequence[nn.Module],
    tokens_U: Sequence[int],
    *,
    trained: bool = True,
    pixels: int | None = None,
) -> Flops:
    """Of U items with so many tokens each (those of padding too, which an encoder computes as any other; 0 of a
    picture that nothing but convolutions sees).

    encoder: a transformers model, whose layers' matrices all tokens are multiplied by, and whose tokens attend to each
    other (its ``config`` says how wide and how deep it is); None where vectors are kept.  behind: layers on an item's
    vector: a head, a fusion.  trained: whether the encoder has gradients; frozen it works forward only.  pixels: S,
    where items are pictures, of which an encoder's convolutions (of patches, or all there is) are counted too.
    Raises UserError of an encoder whose tokens attend in windows.
    """
    n_U = np.asarray(tokens_U, np.float64)
    parts: dict[str, Part] = {}
    if encoder is not None:
        config: Any = encoder.config
        if getattr(config, "window_size", None):
            raise UserError(
                f"operations of a {config.model_type} encoder aren't counted: its tokens attend in windows, and are "
                "fewer from stage to stage"
            )
        forward = 2 * float(n_U.sum()) * weights_of(encoder)
        widths = 2 * getattr(config, "hidden_size", 0) * getattr(config, "num_hidden_layers", 0)
        attends = attention(float((n_U**2).sum()), widths, causal=False)
        parts["encoder"] = Part(forward, 2 * forward if trained else 0.0)
        parts["encoder attention"] = attends if trained else Part(attends.forward, 0.0)
        if pixels is not None:
            first, *others = [len(n_U) * work for work in convolutions(encoder, pixels)] or [0.0]
            # nobody asks for gradients of pixels
            backward = first + 2 * sum(others) if trained else 0.0
            parts["convolutions"] = Part(first + sum(others), backward)
    forward = 2.0 * len(n_U) * sum(map(weights_of, behind))
    # what comes from a frozen encoder needs no gradient, which is half of what the first layer's backward pass forms
    layer = next((m for layer in behind for m in layer.modules() if isinstance(m, nn.Linear)), None)
    saved = 0.0 if trained or layer is None else 2.0 * len(n_U) * weights_of(layer)
    parts["head"] = Part(forward, 2 * forward - saved)
    return Flops(parts)


def convolutions(encoder: nn.Module, pixels: int) -> list[float]:
    """Operations of each convolution of an encoder of pictures, forward, in order: found on one picture, black, of
    ``pixels`` along a side."""
    found: list[float] = []

    def note(layer: nn.Module, given: Any, out_nOPP: Tensor) -> None:
        weight_OIkk = layer.weight
        assert isinstance(weight_OIkk, Tensor)
        found.append(2.0 * out_nOPP.numel() * weight_OIkk.numel() / weight_OIkk.shape[0])

    with ExitStack() as held:
        for layer in encoder.modules():
            if isinstance(layer, nn.Conv2d):
                held.callback(layer.register_forward_hook(note).remove)
        held.enter_context(evaluating(encoder))
        like = next(encoder.parameters())
        encoder(like.new_zeros(1, 3, pixels, pixels))
    return found
