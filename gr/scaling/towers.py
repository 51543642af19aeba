"""Floating-point operations of item towers: encoders of content, on the distinct items of a step, and what makes a
vector of their result.

Shapes: U items of n tokens each, h the encoder's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from gr.scaling.flops import Flops, Part, attention, weights_of


def item_tower(
    encoder: nn.Module | None, behind: Sequence[nn.Module], tokens_U: Sequence[int], *, trained: bool = True
) -> Flops:
    """Of U items with so many tokens each (those of padding too, which an encoder computes as any other).

    encoder: a transformers model, whose layers' matrices all tokens are multiplied by, and whose tokens attend to each
    other (its ``config`` says how wide and how deep it is); None where vectors are kept.  behind: layers on an item's
    vector: a head, a fusion.  trained: whether the encoder has gradients; frozen it works forward only.
    """
    n_U = np.asarray(tokens_U, np.float64)
    parts: dict[str, Part] = {}
    if encoder is not None:
        config: Any = encoder.config
        forward = 2 * float(n_U.sum()) * weights_of(encoder)
        widths = 2 * config.hidden_size * config.num_hidden_layers
        attends = attention(float((n_U**2).sum()), widths, causal=False)
        parts["encoder"] = Part(forward, 2 * forward if trained else 0.0)
        parts["encoder attention"] = attends if trained else Part(attends.forward, 0.0)
    forward = 2.0 * len(n_U) * sum(map(weights_of, behind))
    # what comes from a frozen encoder needs no gradient, which is half of what the first layer's backward pass forms
    first = next((m for layer in behind for m in layer.modules() if isinstance(m, nn.Linear)), None)
    saved = 0.0 if trained or first is None else 2.0 * len(n_U) * weights_of(first)
    parts["head"] = Part(forward, 2 * forward - saved)
    return Flops(parts)
