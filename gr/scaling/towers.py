"""What item towers take: operations of encoding a step's distinct items, and on paper the memory of it.

Both are found by running the encoder on tensors that have shapes and no numbers: its layers, its adapters and what of
it is frozen say themselves what they compute, forward and backward.

Shapes: U rows of a process's view, G distinct rows of all processes, F of those that stand in sequences or are targets,
m items of a chunk, L tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from gr.modality.chunks import BUCKET
from gr.modality.content import Encoded, Sent
from gr.modality.refreshed import Refreshed
from gr.modality.tower import Tower
from gr.processes import Axis
from gr.scaling.flops import Flops, Part, weights_of
from gr.scaling.tally import Operation, Tally

LENGTHS = 8
"""Lengths at which chunks are rehearsed; what lies between counts as the next longer one."""


def encoded_of(tower: Tower) -> Encoded | None:
    """What forms a tower's content in steps; None where nothing does."""
    content = tower.content
    if isinstance(content, Refreshed):
        return content.formed
    return content if isinstance(content, Encoded) else None


class TowerWork:
    """Operations of a tower: the model's own, each distinct item once, whoever encodes it.

    Of an item of L tokens an encoder's are a polynomial of L, found once by an item of three lengths.  What is frozen
    has no gradients by weight, and nothing before the first that trains has any.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower, self.encoded = tower, encoded_of(tower)

    def step(self, rows_G: Tensor, encoded_G: Tensor) -> Flops:
        """Of a step that looks at rows_G, of which encoded_G are encoded (int64, on the CPU)."""
        parts: dict[str, Part] = {}
        if self.encoded is not None:
            lengths_G = self.encoded.items.lengths_n[encoded_G].double().numpy()
            parts["encoder"] = found = self._encoder(lengths_G)
            if self.encoded.recompute:
                parts["recompute"] = Part(0.0, found.forward)
        if isinstance(self.tower.content, Refreshed):
            parts["refresh"] = Part(self._all.forward / self.tower.content.every, 0.0)
        parts["head"] = self._behind(len(rows_G))
        return Flops(parts)

    def _padded(self, found: Flops, encoded_G: Tensor) -> float:
        """What :meth:`step` has ``found``, with every text as long as those beside it may be."""
        assert self.encoded is not None
        lengths_G = self.encoded.items.lengths_n[encoded_G].double().numpy()
        padded = self._encoder(np.minimum(np.ceil(lengths_G / BUCKET) * BUCKET, self._longest))
        more = padded.forward - found.parts["encoder"].forward
        if self.encoded.recompute:
            more *= 2
        return found.total + more + padded.backward - found.parts["encoder"].backward

    def last(self) -> tuple[float, float]:
        """(operations, the same padded) of the last step of a run, of the rows that all processes encoded: the same on
        each, and however many there are.  Of vectors that are kept nobody knows how many rows all look at."""
        if self.encoded is None:
            return 0.0, 0.0
        rows_G = self.encoded.formed_G
        found = self.step(rows_G, rows_G)
        return found.total, self._padded(found, rows_G)

    @cached_property
    def _all(self) -> Part:
        """Of the whole catalogue, once."""
        assert self.encoded is not None
        return self._encoder(self.encoded.items.lengths_n.double().numpy())

    @cached_property
    def _longest(self) -> int:
        """Tokens of an item at most."""
        assert self.encoded is not None
        return int(self.encoded.items.lengths_n.max())

    def _encoder(self, lengths_n: np.ndarray) -> Part:
        forward, backward = (float(np.polyval(powers, lengths_n).sum()) for powers in self._powers)
        return Part(forward, backward)

    @cached_property
    def _powers(self) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients of forward and backward operations of an item by powers of its tokens, the highest first."""
        assert self.encoded is not None
        places = sorted({self._longest, -(-self._longest // 2), -(-self._longest // 4)})
        counted = np.array([_operations(self.encoded, length) for length in places])
        forward, backward = (np.linalg.solve(np.vander(np.array(places, float)), each) for each in counted.T)
        return forward, backward

    def _behind(self, rows: int) -> Part:
        """Head and fusion, on the vectors of so many items."""
        head, fusion = self.tower.head, self.tower.fusion
        content = self.tower.content.learns
        trains = not head.config.frozen
        forward = backward = 0.0
        for number, layer in enumerate(module for module in head.modules() if isinstance(module, nn.Linear)):
            work = 2.0 * rows * weights_of(layer)
            forward += work
            # what comes from a frozen encoder needs no gradient
            backward += work * (trains + (content if number == 0 else content or trains))
        if fusion is not None:
            work = 2.0 * rows * weights_of(fusion)
            forward, backward = forward + work, backward + 2 * work
        return Part(forward, backward)


def _operations(encoded: Encoded, length: int) -> tuple[float, float]:
    """(forward, backward) of one item of so many tokens, by shapes alone; nothing of the encoder is touched."""
    encoder = encoded.encoder
    with FakeTensorMode(allow_non_fake_inputs=True):
        named = {
            name: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad)
            for name, t in chain(encoder.named_parameters(), encoder.named_buffers())
        }
        with Tally() as tally:
            out = functional_call(encoder, named, encoded.items.shaped(1, length))
            forward = _flops(tally)
            if out.requires_grad:
                out.backward(torch.empty_like(out))
        return forward, _flops(tally) - forward


def _flops(tally: Tally) -> float:
    return sum(operation.flops for operation in tally.operations)


@dataclass(frozen=True)
class Encoding:
    """What a step takes for its items, on one process of a plan.

    items: G.  own: that this process encodes, in so many ``chunks``.  forming: bytes at the peak while they are formed;
    kept: that stay until their gradients come back; taking_back: at the peak while these go through the encoder,
    those of its parameters included; spread: of vectors on their way between processes.  work: operations, and how
    often each.  flops: of all processes.  sent: by this one.
    """

    items: int
    own: int
    chunks: int
    forming: float
    kept: float
    taking_back: float
    spread: float
    work: list[tuple[Operation, float]]
    flops: Flops
    sent: list[Sent]


def rehearsed(
    tower: Tower, own_U: int, rows_G: Tensor, batch_F: Tensor, processes: int, fake: FakeTensorMode
) -> Encoding:
    """A tower on paper, in ``fake``.  own_U: rows of a process's view."""
    content, encoded = tower.content, encoded_of(tower)
    encoded_G = content.encodes(rows_G, batch_F)
    sent = content.sends(own_U, len(encoded_G), tower.rows, processes) if processes > 1 else []
    flops = TowerWork(tower).step(rows_G, encoded_G)
    if encoded is None or not len(encoded_G):
        return Encoding(len(encoded_G), 0, 0, 0.0, 0.0, 0.0, 0.0, [], flops, sent)
    # dealt by length, shortest first: who has the longest has the most
    axis = Axis((len(encoded_G) - 1) % processes, processes)
    _, own_R, parts = encoded.dealt(encoded_G, axis)
    lengths_R = encoded.items.lengths_n[encoded_G[own_R]]
    shapes = [(len(part), int(lengths_R[part].max())) for part in parts]
    peaks, work = _of_chunks(encoded, shapes, fake)
    if isinstance(content, Refreshed):
        work += _formed_again(encoded, content.every, processes, fake)
    spread = 4.0 * encoded.width * (len(own_R) + (2 if processes > 1 else 1) * len(encoded_G))
    return Encoding(len(encoded_G), len(own_R), len(parts), *peaks, spread, work, flops, sent)


def _of_chunks(
    encoded: Encoded, shapes: Sequence[tuple[int, int]], fake: FakeTensorMode
) -> tuple[tuple[float, float, float], list[tuple[Operation, float]]]:
    """((forming, kept, taking_back), work) of chunks of these (m, L), in order."""
    coarse = max(1, max(length for _, length in shapes) // LENGTHS)
    longest = max(length for _, length in shapes)
    shapes = [(count, min(-(-length // coarse) * coarse, longest)) for count, length in shapes]
    most: dict[int, int] = {}
    for count, length in shapes:
        most[length] = max(most.get(length, 0), count)
    chunks = {length: _chunk(encoded, count, length, fake, again=True) for length, count in most.items()}
    words = _words(encoded, sum(count * length for count, length in shapes), fake)
    kept = forming = words.kept
    before = []  # what is kept when each begins
    work = [(operation, 1.0) for operation in words.operations]
    for count, length in shapes:
        chunk, share = chunks[length], count / most[length]
        before.append(kept)
        forming = max(forming, kept + share * chunk.forming)
        kept += share * chunk.kept
        work += [(operation, share) for operation in chunk.operations]
    # the last one is the first that gradients go through, and makes those of parameters
    taking_back = before[-1] + _chunk(encoded, *shapes[-1], fake, again=False).taking_back
    gradients = 4.0 * sum(p.numel() for p in encoded.encoder.parameters() if p.requires_grad)
    for begun, (count, length) in list(zip(before, shapes))[:-1]:
        share = count / most[length]
        taking_back = max(taking_back, begun + share * chunks[length].taking_back + gradients)
    return (forming, kept, max(taking_back, words.taking_back + gradients)), work


def _words(encoded: Encoded, tokens: int, fake: FakeTensorMode) -> _Chunk:
    """What looking up the rows of all chunks' tokens takes, where that is done once.  Their gradients come while what
    the chunks keep goes; at the end they are there in parts, beside them as one, and what was looked up."""
    encoder = encoded.encoder
    with fake, Tally(given=[*encoder.parameters(), *encoder.buffers()]) as tally:
        given = encoded.items.shaped(1, tokens)
        ((*_, words),) = encoded.prepared([given])
        if words is given[-1]:  # nothing is looked up
            return _Chunk(0.0, 0.0, 0.0, [])
        size = float(words.nbytes)
        if words.requires_grad:
            words.backward(torch.empty_like(words))
        return _Chunk(size, size, 3 * size if words.requires_grad else 0.0, tally.operations)


def _formed_again(
    encoded: Encoded, every: int, processes: int, fake: FakeTensorMode
) -> list[tuple[Operation, float]]:
    """The whole catalogue forward, spread over the steps that its vectors are kept for."""
    lengths_I = encoded.items.lengths_n
    count, length = min(encoded.most, len(lengths_I)), max(1, round(float(lengths_I.double().mean())))
    with fake, torch.no_grad(), Tally() as tally:
        encoded.encoder(*encoded.items.shaped(count, length))
    return [(operation, len(lengths_I) / count / processes / every) for operation in tally.operations]


@dataclass(frozen=True)
class _Chunk:
    """Bytes at the peak while it is formed, that stay, at the peak while its gradient goes through; operations.  What
    is looked up for all chunks together is no part of one."""

    forming: float
    kept: float
    taking_back: float
    operations: list[Operation]


def _chunk(encoded: Encoded, count: int, length: int, fake: FakeTensorMode, *, again: bool) -> _Chunk:
    """again: on gradients of parameters that other chunks have left."""
    encoder = encoded.encoder
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    with fake:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter) if again else None
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        (prepared,) = encoded.prepared([encoded.items.shaped(count, length)])
        inputs = [given.detach().requires_grad_(given.requires_grad) for given in prepared]
        with Tally(given=[*encoder.parameters(), *encoder.buffers(), *gradients, *inputs]) as tally:
            with torch.autocast("cpu", torch.bfloat16, enabled=encoded.bf16):
                out = encoded.call(inputs)
            forming, kept = tally.peak, tally.live
            tally.peak = tally.live
            out.backward(torch.empty_like(out))
        for parameter in trained:
            parameter.grad = None
    return _Chunk(float(forming), float(kept), float(tally.peak), tally.operations)
