"""Floating-point operations of a training step, from the real lengths of its sequences: the rules, and a retrieval
model's sum.  Other models: gr/scaling/families.py.

A multiplication and an addition are two operations.  What is counted is the model's own work:

    linear       2 rows inputs outputs forward, twice that backward (its gradients by input and by weight)
    attention    2 (Q + V) H sum n^2 forward (q . k and a . v), halved under the causal mask; 2.5 times that backward,
                 where a kernel forms q . k again rather than keep it: as gr_kernels' benchmarks count
    embedding    2 rows D forward (scale and position), as much backward; looking rows up moves memory alone
    loss         2 targets candidates D forward, twice that backward
    recompute    with train.activation_checkpointing the layers' forward work once more, in the backward pass (at
                 most: torch leaves out what comes behind the last value that is needed)

Norms, activations, softmax, bias and optimiser are left out: they take time of memory, few operations.  The widths are
read off the encoder itself, built without memory, so that they are those that run.

Shapes: B sequences, T actions in the batch, H heads, D model width, Q query/key width per head, V value width per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gr.config import RunConfig
from gr.errors import UserError
from gr.models.layers import Linear, Stack

ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Part:
    """Operations of one part of a step."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Flops:
    """Operations of a step by part: linear, attention, embedding, loss, recompute."""

    parts: dict[str, Part]

    @property
    def forward(self) -> float:
        return sum(part.forward for part in self.parts.values())

    @property
    def backward(self) -> float:
        return sum(part.backward for part in self.parts.values())

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def without(self, name: str) -> float:
        """All but a part."""
        return sum(part.forward + part.backward for other, part in self.parts.items() if other != name)


class Accounting:
    """What a step of ``config`` costs.  items: I, the rows of the catalogue.

    parameters: of the encoder, that is without tables and positions (the N of scaling laws).
    Raises UserError for a model of another kind, or an encoder that doesn't say what its attention does.
    """

    def __init__(self, config: RunConfig, items: int) -> None:
        if config.model.name != "retrieval" or config.objective is None:
            raise UserError(
                f"operations are counted of retrieval models alone, and model.name is {config.model.name}: "
                "use model=retrieval with an objective"
            )
        self.config, self.items = config, items
        length = config.data.max_length + config.model.task.build().extra_inputs
        with torch.device("meta"):
            encoder = config.model.encoder.build(config.model.dim, length)
        self.parameters = sum(p.numel() for p in encoder.parameters())
        self.encoder = EncoderWork(encoder, config)

    def step(self, lengths_B: Sequence[int] | np.ndarray, targets: int | None = None) -> Flops:
        """lengths_B: of the inputs.  targets: that are predicted; where nothing is said one for each input, or of a
        task that hides inputs the share that it hides on average."""
        n_B = np.asarray(lengths_B, np.float64)
        return Flops(retrieval(self.config, self.encoder, n_B, targets, self.items))


class EncoderWork:
    """What ``encoder`` does with the rows of a batch, as ``config`` trains it."""

    def __init__(self, encoder: nn.Module, config: RunConfig) -> None:
        stacks = [module for module in encoder.modules() if isinstance(module, Stack)]
        self.causal: bool = encoder.causal  # type: ignore[assignment]
        self.weights, self.widths = weights_of(encoder), attention_widths(encoder)
        self.stack_weights = sum(map(weights_of, stacks))
        self.stack_widths = sum(map(attention_widths, stacks))
        self.recomputes = config.train.activation_checkpointing

    def parts(self, rows_B: np.ndarray) -> dict[str, Part]:
        """On so many rows of each sequence, with what is formed again."""
        T, squares = float(rows_B.sum()), float((rows_B**2).sum())
        parts = {
            "linear": products(T, self.weights),
            "attention": attention(squares, self.widths, causal=self.causal),
        }
        if self.recomputes:
            again = attention(squares, self.stack_widths, causal=self.causal)
            parts["recompute"] = Part(0.0, 2 * T * self.stack_weights + again.forward)
        return parts


def retrieval(
    config: RunConfig, encoder: EncoderWork, rows_B: np.ndarray, targets: int | None, items: int
) -> dict[str, Part]:
    """A retrieval model's parts; rows_B: inputs of each sequence."""
    T, D = float(rows_B.sum()), config.model.dim
    S = T * predicted(config) if targets is None else float(targets)
    assert config.objective is not None
    scored = config.objective.component().scored(config.objective, int(S), items)  # type: ignore[attr-defined]
    widths = D + sum(config.model.similarity.matryoshka)  # type: ignore[attr-defined]  # a loss at each
    return {
        **encoder.parts(rows_B),
        "embedding": Part(2 * T * D, 2 * T * D),
        "loss": products(S * scored, widths),
    }


def products(rows: float, weights: float, *, inputs_have_gradients: bool = True) -> Part:
    """Rows by matrices of so many weights."""
    forward = 2 * rows * weights
    return Part(forward, forward * (2 if inputs_have_gradients else 1))


def predicted(config: RunConfig) -> float:
    """Targets an input, on average (a sequence of which none was drawn hides its last action, which isn't counted)."""
    task = config.model.task
    if not task.component().masks:
        return 1.0
    return (1 - task.last_probability) * task.mask_probability


def attention(squares: float, widths: int, *, causal: bool) -> Part:
    """squares: the sum of n^2 over sequences.  widths: the sum of H (Q + V) over layers."""
    forward = 2 * widths * squares / (2 if causal else 1)
    return Part(forward, ATTENTION_BACKWARD * forward)


def weights_of(module: nn.Module) -> int:
    """Entries of the matrices that every row is multiplied by."""
    found = 0
    for part in module.modules():
        if isinstance(part, Linear | nn.Linear):
            found += entries(part.weight)
        elif isinstance(part, nn.RNNBase):
            found += sum(entries(p) for name, p in part.named_parameters() if name.startswith("weight"))
    return found


def entries(parameter: Tensor) -> int:
    """Numbers of a parameter, all of them where DeepSpeed has left this process a part."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def attention_widths(module: nn.Module) -> int:
    """The sum of H (Q + V) over the layers that attend: each says its ``attention_width``."""
    return sum(getattr(part, "attention_width", 0) for part in module.modules())
