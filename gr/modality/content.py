"""The vectors of items' content: fixed ones, or those that an encoder forms for a step and whose gradients it takes.

Over several processes each distinct item of a step is encoded by one of them, its vector sent to those that need it,
its gradient sent back.

Shapes: I items, U distinct rows of this process's step, G of everybody's, R of them encoded or held here, E width of
content.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gr.embeddings.shares import Shares
from gr.embeddings.table import Array
from gr.modality.chunks import chunks
from gr.modality.digest import Sketch, digest_of, sketched, sums_of
from gr.modality.encoder import Encoder
from gr.modes import evaluating
from gr.processes import Axis, Processes
from gr.progress import PlainProgress, Progress


class Inputs(Protocol):
    """What an encoder reads of n items.  lengths_n: int64, by which they are put into chunks."""

    @property
    def lengths_n(self) -> Tensor: ...

    def inputs(self, rows_m: Tensor) -> tuple[Tensor, ...]:
        """What the encoder is called with for items ``rows_m``, on the CPU."""
        ...


class Items(Inputs, Protocol):
    """All items that a model knows, with what plans ask."""

    @property
    def held(self) -> int:
        """Bytes that they take in the machine's memory."""
        ...

    def shaped(self, count: int, length: int) -> tuple[Tensor, ...]:
        """What it would be called with for so many items, the longest of that length: empty ones."""
        ...


class Sent(NamedTuple):
    """What a process sends in a step, for plans.  bytes: on average.  all_to_all: to each what it asked for, else the
    same to all."""

    what: str
    bytes: float
    all_to_all: bool = False


class Content(ABC):
    """``width``: E.  ``collective``: whether :meth:`of_step` and :meth:`all` are exchanges.  ``encoder``: what forms
    vectors, where its weights belong to the model."""

    width: int
    encoder: Encoder | None = None
    collective = False

    def begin(self, step: int, batch: Sequence[Tensor]) -> None:  # noqa: B027  (most have no use for it)
        """The step of that number begins, the run's first being 0, and its sequences and targets have these rows
        (tensors of any shape); what :meth:`of_step` is asked for besides are candidates."""

    @abstractmethod
    def of_step(self, rows_U: Tensor) -> Tensor:
        """(U, E) float32, for a step with gradients; every process calls it together, once a step."""

    def take_back(self, gradient_UE: Tensor) -> None:  # noqa: B027  (fixed vectors take none)
        """The gradient of what :meth:`of_step` gave last; every process calls it together."""

    @abstractmethod
    def all(self) -> Tensor:
        """(I, E) float32 of the whole catalogue as it is now, without gradients; every process calls it together."""

    def some(self, rows_n: Tensor) -> Tensor:
        """(n, E) the same of some distinct rows (int64) in ascending order alone, the same ones on every process."""
        return self.all().index_select(0, rows_n)

    def own(self) -> Tensor:
        """(R, E) this process's stretch of :meth:`all`; every process calls it together.  Not of vectors that every
        process has."""
        raise TypeError(f"{type(self).__name__} has all vectors on every process")

    @abstractmethod
    def unseen(self, items: pa.Table) -> Tensor:
        """(n, E) float32, without gradients, of n items that the catalogue doesn't have, by their columns."""

    learns = False
    """Whether it changes from step to step."""

    # -- what it takes, for plans (gr/scaling/towers.py), which have U rows of a process's view, G of everybody's,
    # and F of those that stand in sequences or are targets

    def encodes(self, rows_G: Tensor, batch_F: Tensor) -> Tensor:
        """Of the distinct rows of a step those that are encoded in it, with gradients."""
        return rows_G[:0]

    def keeps(self, rows: int, processes: int) -> dict[str, float]:
        """Bytes on each of so many processes, by kind, that stay from step to step beside parameters."""
        return {}

    def sends(self, own: int, encoded: int, rows: int, processes: int) -> list[Sent]:
        """In a step with so many rows of its own (U) and ``encoded`` by all; ``rows``: I."""
        return []

    def outside_digest(self) -> str:
        """See :meth:`gr.embeddings.table.Table.outside_digest`."""
        return ""

    def encoder_digest(self) -> str:
        """See :meth:`gr.embeddings.table.Table.encoder_digest`."""
        return "" if self.came is None else self.came()

    came: Callable[[], str] | None = None
    """The same, where an encoder came to the run."""

    def made_of(self) -> dict[str, str]:
        """See :meth:`gr.embeddings.table.Table.made_of`."""
        statistics = {} if self.encoder is None else self.encoder.statistics()
        found = {"statistics": digest_of(statistics)} if statistics else {}
        return found if self.read is None else found | self.read()

    read: Callable[[], dict[str, str]] | None = None
    """The same of what an encoder reads."""

    def sketch(self, rows: int | None = None) -> Sketch | None:
        """See :meth:`gr.embeddings.table.Table.sketch`."""
        return None

    def state(self) -> dict[str, Array]:
        """What it keeps from step to step beside parameters (:meth:`gr.embeddings.table.Table.state`)."""
        return {}


class _Made(Content):
    """Vectors that nothing moves, made when they are first asked for.  other: makes those of items that aren't in the
    catalogue.  encoder: what makes them, where its weights may be another run's.  digest: of the weights that make
    them, where no run has trained these.  file: what they come from, where nothing makes them."""

    def __init__(
        self,
        width: int,
        other: Callable[[pa.Table], Tensor],
        encoder: Encoder | None,
        digest: Callable[[], str] | None,
        file: str | None,
    ) -> None:
        self.width, self._other, self.encoder, self._digest, self._file = width, other, encoder, digest, file

    def outside_digest(self) -> str:
        return "" if self._digest is None else self._digest()


class Fixed(_Made):
    """All of them on every process, (I, E)."""

    def __init__(
        self,
        width: int,
        make: Callable[[], Tensor],
        other: Callable[[pa.Table], Tensor],
        device: torch.device,
        collective: bool = False,
        encoder: Encoder | None = None,
        digest: Callable[[], str] | None = None,
        file: str | None = None,
    ) -> None:
        super().__init__(width, other, encoder, digest, file)
        self._make, self.device, self.collective = make, device, collective
        self._vectors_IE: Tensor | None = None

    def of_step(self, rows_U: Tensor) -> Tensor:
        vectors_IE = self.all()
        # rows of a step are distinct and ascending: as many as there are is all of them
        return vectors_IE if len(rows_U) == len(vectors_IE) else vectors_IE.index_select(0, rows_U)

    def all(self) -> Tensor:
        if self._vectors_IE is None:
            self._vectors_IE = self._make().to(self.device)
        return self._vectors_IE

    def sketch(self, rows: int | None = None) -> Sketch | None:
        if self._file is None:
            return None
        vectors_RE = self.all()[:rows]
        return sketched(self._file, len(vectors_RE), sums_of(vectors_RE, 0))

    def unseen(self, items: pa.Table) -> Tensor:
        return self._other(items).to(self.device)

    def keeps(self, rows: int, processes: int) -> dict[str, float]:
        return {"vectors of items": 4.0 * rows * self.width}


class FixedShares(_Made):
    """Each process holds a stretch of them and fetches the others that a step needs."""

    def __init__(
        self,
        width: int,
        make: Callable[[], Shares],
        other: Callable[[pa.Table], Tensor],
        processes: Processes,
        encoder: Encoder | None = None,
        digest: Callable[[], str] | None = None,
        file: str | None = None,
    ) -> None:
        super().__init__(width, other, encoder, digest, file)
        self._make, self.processes = make, processes
        self.collective = processes.world.size > 1
        self._shares: Shares | None = None

    def of_step(self, rows_U: Tensor) -> Tensor:
        return self._held().fetch(rows_U)

    def all(self) -> Tensor:
        return self.processes.world.gather(self.own())

    def some(self, rows_n: Tensor) -> Tensor:
        return self._held().fetch(rows_n)

    def own(self) -> Tensor:
        return self._held().own_RE

    def sketch(self, rows: int | None = None) -> Sketch | None:
        if self._file is None:
            return None
        held = self._held()
        rows = held.rows if rows is None else rows
        own_RE = held.own_RE[: max(rows - held.own.start, 0)]
        return sketched(self._file, rows, self.processes.world.sum(sums_of(own_RE, held.own.start)))

    def unseen(self, items: pa.Table) -> Tensor:
        return self._other(items).to(self.processes.device)

    def keeps(self, rows: int, processes: int) -> dict[str, float]:
        return {"vectors of items": 4.0 * -(-rows // processes) * self.width}

    def sends(self, own: int, encoded: int, rows: int, processes: int) -> list[Sent]:
        return fetched(own, self.width, processes)

    def _held(self) -> Shares:
        if self._shares is None:
            made = self._make()
            self._shares = Shares(made.rows, made.own_RE.to(self.processes.device), made.axis)
        return self._shares


def fetched(own: int, width: int, processes: int) -> list[Sent]:
    """For so many rows of shares, by their numbers."""
    others = (processes - 1) / processes
    return [Sent("row numbers", 8.0 * own * others, True), Sent("vectors", 4.0 * own * width * others, True)]


class Encoded(Content):
    """Vectors that an encoder with parameters of its own forms.

    items: what it reads of the catalogue; read: of items that aren't in it.  said: is given what has been read, to say
    what couldn't be.  most: items that it takes at once.
    recompute: keep nothing of a chunk for the backward pass, and form it again there.  bf16: compute steps in bfloat16.
    """

    learns = True
    encoder: Encoder

    def __init__(
        self,
        encoder: Encoder,
        items: Items,
        processes: Processes,
        read: Callable[[pa.Table], Items],
        said: Callable[[Items], None],
        *,
        most: int,
        recompute: bool = False,
        bf16: bool = False,
    ) -> None:
        self._read, self._said = read, said
        self.encoder, self.items, self.processes = encoder, items, processes
        self.width, self.most, self.recompute, self.bf16 = encoder.width, most, recompute, bf16
        self.collective = processes.world.size > 1
        self.formed_G = torch.empty(0, dtype=torch.int64)
        """The rows that all processes encoded in the last step, each once."""
        self._step: _Step | None = None

    def of_step(self, rows_U: Tensor) -> Tensor:
        world, device = self.processes.world, rows_U.device
        rows_G = world.gather(rows_U).unique().cpu()
        self.formed_G = rows_G
        order_G, own_R, parts = self.dealt(rows_G, world)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.form(
                [part.to(device) for part in self.items.inputs(rows_G[own_R[p]])] for p in parts
            )
        step = _Step(rows_G, own_R, parts, outputs)
        vectors_RE = rows_U.new_zeros(len(own_R), self.width, dtype=torch.float32)
        for part, output in zip(parts, outputs, strict=True):
            vectors_RE[part.to(device)] = output.detach()
        dealt = torch.cat([order_G[rank :: world.size] for rank in range(world.size)]).to(device)
        gathered = world.gather(vectors_RE)
        vectors_GE = torch.empty_like(gathered).index_copy_(0, dealt, gathered)
        step.place_U = torch.searchsorted(rows_G.to(device), rows_U)
        self._step = step
        return vectors_GE.index_select(0, step.place_U)

    def dealt(self, rows_G: Tensor, axis: Axis) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(order_G, own_R, parts): places of ``rows_G`` as they are dealt out, those of this process of ``axis``, and
        the chunks that it encodes these in."""
        lengths_G = self.items.lengths_n[rows_G]
        # by length, so that everybody has about as many tokens
        order_G = torch.argsort(lengths_G, stable=True)
        own_R = order_G[axis.rank :: axis.size]
        return order_G, own_R, chunks(lengths_G[own_R], self.most)

    def take_back(self, gradient_UE: Tensor) -> None:
        step, self._step = self._step, None
        assert step is not None and step.place_U is not None, "a step's gradients come back once"
        device = gradient_UE.device
        total_GE = gradient_UE.new_zeros(len(step.rows_G), self.width)
        total_GE.index_copy_(0, step.place_U, gradient_UE)  # a row stands once in a view
        self.processes.world.add_up(total_GE)
        own_RE = total_GE.index_select(0, step.own_R.to(device))
        gradients = [own_RE.index_select(0, part.to(device)) for part in step.parts]
        if step.outputs and any(output.requires_grad for output in step.outputs):
            torch.autograd.backward(step.outputs, gradients)

    def form(self, chunks: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """(m, E) of each of a step's chunks, by what their items are read as."""
        return [self.call(inputs) for inputs in self.prepared(chunks)]

    def prepared(self, chunks: Iterable[Sequence[Tensor]]) -> Iterable[Sequence[Tensor]]:
        """What the encoder is called with for each; with ``recompute`` nothing that would stay is made for them."""
        return chunks if self.recompute else self.encoder.prepared(chunks)

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        """(m, E) of a chunk, by what the encoder is called with."""
        if self.recompute:
            return checkpoint(self.encoder, *inputs, use_reentrant=False)
        return self.encoder(*inputs)

    def encodes(self, rows_G: Tensor, batch_F: Tensor) -> Tensor:
        return rows_G

    def sends(self, own: int, encoded: int, rows: int, processes: int) -> list[Sent]:
        own_share, size = -(-encoded // processes), 4.0 * self.width
        return [
            Sent("row numbers", 8.0 * own * (processes - 1)),
            Sent("vectors", size * own_share * (processes - 1)),
            Sent("gradients of vectors", 2 * size * encoded * (processes - 1) / processes),
        ]

    def all(self) -> Tensor:
        return self.processes.world.gather(self.own())

    def some(self, rows_n: Tensor) -> Tensor:
        some = _Some(self.items, rows_n.cpu())
        found = encoded(self.encoder, some, self.processes, self.most, Progress())
        self._said(self.items)
        return self.processes.world.gather(found.own_RE)

    def own(self) -> Tensor:
        return self._all_of(self.items).own_RE

    def unseen(self, items: pa.Table) -> Tensor:
        return self.processes.world.gather(self._all_of(self._read(items)).own_RE)

    def _all_of(self, items: Items) -> Shares:
        found = encoded(self.encoder, items, self.processes, self.most)
        self._said(items)
        return found


class _Some:
    """Some of ``items``: what an encoder reads of these alone."""

    def __init__(self, items: Items, rows_n: Tensor) -> None:
        self._items, self._rows_n = items, rows_n
        self.lengths_n = items.lengths_n[rows_n]

    def inputs(self, rows_m: Tensor) -> tuple[Tensor, ...]:
        return self._items.inputs(self._rows_n[rows_m])


class _Step:
    """What a step's forward pass leaves for its gradients."""

    place_U: Tensor | None = None

    def __init__(self, rows_G: Tensor, own_R: Tensor, parts: Sequence[Tensor], outputs: list[Tensor]) -> None:
        self.rows_G, self.own_R, self.parts, self.outputs = rows_G, own_R, parts, outputs


def encoded(
    encoder: Encoder,
    items: Inputs,
    processes: Processes,
    most: int,
    progress: Progress | None = None,
) -> Shares:
    """(I, E) float32: all ``items``, without gradients, on the processes' device, a stretch on each; every process
    calls it together and encodes some chunks.  They are the same, and so are the bits, however many processes there
    are, where each has as many threads."""
    world, device, lengths_n = processes.world, processes.device, items.lengths_n
    parts = chunks(lengths_n, most)
    # the longest first: what doesn't fit into memory is known at once, and the time that is left doesn't grow
    own = parts[world.rank :: world.size][::-1]
    rows = sum(map(len, own))
    # lines even on a terminal: a bar may be there already
    shown = progress if progress is not None else PlainProgress() if processes.is_main else Progress()
    with evaluating(encoder), shown.stage("encoding items", rows, "items") as stage:
        outputs = []
        for part in own:
            outputs.append(encoder(*(given.to(device) for given in items.inputs(part))))
            stage.advance(len(part))
    mine = torch.cat([torch.empty(0, encoder.width, device=device), *outputs])
    places = torch.cat([torch.empty(0, dtype=torch.int64), *own])
    return Shares.by_row(len(lengths_n), places.to(device), mine, world)
