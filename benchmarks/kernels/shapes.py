"""The shapes that are measured: on a GPU about TOKENS rows a batch in bfloat16, on a CPU what is trained on laptops.

B sequences, N longest sequence, H heads, D width of a head (of the model, for losses), T queries, I catalogue size,
K negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from benchmarks import lengths

TOKENS = 131_072
GRIDS = ("core", "full", "tiny")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
BIASES = ("none", "position", "position+time")


def draw(kind: str, B: int, N: int) -> np.ndarray:
    """(B,) int64 lengths, the same at every call; the last action of a user is only ever a target.

    kind: "full" (all N), "uniform" (1 to N), "ml-1m" or "books" (the data's, cut at N).
    """
    rng = np.random.default_rng(0)
    if kind == "full":
        return np.full(B, N)
    if kind == "uniform":
        return rng.integers(1, N + 1, B)
    users = {"ml-1m": lengths.ml_1m, "books": lengths.books}[kind](rng.random(B))
    return np.clip(users - 2, 1, N)


def sequences(kind: str, N: int) -> int:
    """How many give about TOKENS rows."""
    return max(1, round(TOKENS / draw(kind, 4096, N).mean()))


@dataclass(frozen=True)
class AttentionSpec:
    """lengths: as draw() knows them."""

    lengths: str
    B: int
    N: int
    H: int
    D: int
    bias: str
    dtype: str

    @property
    def name(self) -> str:
        shape = f"n{self.N}-d{self.D}-h{self.H}-b{self.B}"
        return f"{self.lengths}-{shape}-{self.bias}-{SHORT[self.dtype]}"

    def small(self) -> AttentionSpec:
        """float32's errors grow with the sums of the tables' gradients, so a CPU's cases stay as large as can be;
        those of 16 bits are made by the inputs' rounding."""
        scores, N = (2**23 if self.dtype == "float32" else 2**19), min(self.N, 256)
        return replace(self, B=max(1, min(self.B, scores // (self.H * N**2))), N=N)

    def draw(self) -> np.ndarray:
        return draw(self.lengths, self.B, self.N)


@dataclass(frozen=True)
class BlockSpec:
    """A whole HSTU layer of model width H x D on the sequences of ``attention``."""

    attention: AttentionSpec
    dropout: float

    @property
    def dtype(self) -> str:
        return self.attention.dtype

    @property
    def name(self) -> str:
        return f"{self.attention.name}-drop{self.dropout:g}"

    def small(self) -> BlockSpec:
        return replace(self, attention=self.attention.small())


@dataclass(frozen=True)
class LossSpec:
    """K: negatives (a position, or of all where shared); 0 for the softmax over the catalogue.  normalized: scores are
    cosines, the table's rows normalised on the way."""

    T: int
    I: int
    D: int
    K: int
    dtype: str
    shared: bool = False
    normalized: bool = True

    @property
    def name(self) -> str:
        negatives = f"-k{self.K}" + ("-shared" if self.shared else "") if self.K else ""
        raw = "" if self.normalized else "-raw"
        return f"t{self.T}-i{self.I}-d{self.D}{negatives}{raw}-{SHORT[self.dtype]}"

    def small(self) -> LossSpec:
        return replace(self, T=min(self.T, 64), I=min(self.I, 1024), K=min(self.K, 128))


@dataclass(frozen=True)
class JaggedSpec:
    """operation: one of JAGGED.  D: of a row.  lengths: as draw() knows them."""

    operation: str
    lengths: str
    B: int
    N: int
    D: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.operation}-{self.lengths}-n{self.N}-d{self.D}-b{self.B}-{SHORT[self.dtype]}"

    def small(self) -> JaggedSpec:
        """float32's errors grow with the sums of the tables' gradients: a CPU's cases stay as they are."""
        return self if self.dtype == "float32" else replace(self, B=min(self.B, 32), N=min(self.N, 256))


JAGGED = ("concat", "split", "to_dense", "to_jagged", "positions_and_times", "dropout")


@dataclass(frozen=True)
class TableSpec:
    """The scores of B sequences of length N, their gradients in ``dtype``, their buckets in ``index``: of distances
    ("position", N entries) or of times ("time", 129)."""

    table: str
    B: int
    N: int
    index: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.table}-b{self.B}-n{self.N}-{self.index}-{SHORT[self.dtype]}"

    def small(self) -> TableSpec:
        """Errors of float32 sums grow with what is summed, so the cases listed here stay as they are."""
        return replace(self, B=max(1, min(self.B, 2**24 // self.N**2)))


def attention(device: str, grid: str) -> list[AttentionSpec]:
    if grid == "tiny":
        dtype = "float32" if device == "cpu" else "bfloat16"
        return [AttentionSpec("ml-1m", 8, 48, 2, 16, "position+time", dtype)]
    if device == "cpu":
        return _attention_cpu(grid)
    full = [_full(N, H, D, bias) for N, H, D, bias in product(_octaves(), (4, 8), (64, 128, 256), BIASES)]
    jagged = [
        _jagged(kind, N, H, D, bias)
        for kind, N, H, D, bias in product(
            ("uniform", "ml-1m"), (200, 512, *_octaves()[2:]), (4, 8), (64, 128, 256), BIASES
        )
    ]
    if grid == "full":
        return full + jagged
    core = [s for s in full if s.H == 4 and s.bias == "none"]
    core += [s for s in full if s.H == 4 and s.D == 64 and s.bias != "none" and s.N in (1024, 4096)]
    core += [s for s in full if s.H == 8 and s.D == 64 and s.bias == "none" and s.N == 4096]
    for spec in jagged:
        short = spec.lengths == "ml-1m" and spec.N in (200, 512, 2048)
        long = spec.lengths == "uniform" and spec.N in (1024, 8192)
        if spec.H == 4 and spec.D in (64, 128) and spec.bias != "position" and (short or long):
            core.append(spec)
    return core


def _attention_cpu(grid: str) -> list[AttentionSpec]:
    ml_1m = AttentionSpec("ml-1m", 128, 200, 1, 50, "position+time", "float32")
    books = AttentionSpec("books", 128, 50, 4, 16, "position+time", "float32")
    core = [ml_1m, books, replace(ml_1m, bias="none"), replace(ml_1m, B=4, N=1024, lengths="full", H=2, D=64)]
    if grid == "core":
        return core
    grown = [
        AttentionSpec(kind, B, N, H, D, bias, "float32")
        for kind, (B, N), (H, D), bias in product(
            ("full", "uniform", "ml-1m"), ((32, 256), (4, 1024), (1, 4096)), ((4, 16), (2, 64)), BIASES
        )
    ]
    return core + [spec for spec in grown if spec not in core]


def block(device: str, grid: str) -> list[BlockSpec]:
    if grid == "tiny":
        return [BlockSpec(spec, 0.2) for spec in attention(device, "tiny")]
    if device == "cpu":
        specs = [spec for spec in attention(device, "core") if spec.lengths in ("ml-1m", "books")]
        return [BlockSpec(spec, 0.2) for spec in specs if spec.bias == "position+time"]
    specs = [
        AttentionSpec("full", TOKENS // 1024, 1024, 4, 64, "position+time", "bfloat16"),
        AttentionSpec("full", TOKENS // 4096, 4096, 4, 128, "none", "bfloat16"),
        AttentionSpec("ml-1m", 1024, 200, 4, 64, "position+time", "bfloat16"),
        AttentionSpec("ml-1m", 512, 2048, 4, 128, "position+time", "bfloat16"),
    ]
    if grid == "full":
        specs += [_full(N, 4, D, bias) for N, D, bias in product((512, 2048, 8192), (64, 128, 256), BIASES)]
    return [BlockSpec(spec, 0.2) for spec in specs]


def cross_entropy(device: str, grid: str) -> list[LossSpec]:
    if grid == "tiny":
        return [LossSpec(200, 300, 16, 0, "float32")]
    if device == "cpu":
        core = [LossSpec(14_000, 3_883, 64, 0, "float32"), LossSpec(14_000, 3_883, 50, 0, "float32")]
        return core + [LossSpec(1_000, 100_000, 64, 0, "float32")] * (grid == "full")
    million = LossSpec(8192, 1_000_000, 128, 0, "bfloat16")
    core = [replace(million, I=I, normalized=False) for I in (10_000, 100_000, 1_000_000)] + [million]
    more = [LossSpec(T, 1_000_000, D, 0, "bfloat16") for T, D in ((8192, 64), (8192, 256), (32_768, 128))]
    return core + more if grid == "full" else core


def log_partition(device: str, grid: str) -> list[LossSpec]:
    """Of cross_entropy's the first, and on a GPU the largest."""
    specs = cross_entropy(device, grid)
    if grid == "full":
        return specs
    return [specs[0], specs[-1]] if device == "cuda" and grid == "core" else specs[:1]


def sampled_softmax(device: str, grid: str) -> list[LossSpec]:
    if grid == "tiny":
        return [LossSpec(100, 300, 16, 8, "float32"), LossSpec(100, 300, 16, 8, "float32", shared=True)]
    if device == "cpu":
        core = [LossSpec(14_500, 3_883, 50, 128, "float32"), LossSpec(2_500, 695_762, 64, 512, "float32")]
    else:
        core = [LossSpec(32_768, 1_000_000, D, 512, "bfloat16") for D in (64, 256)]
    return [replace(spec, shared=shared) for spec in core for shared in (False, True)]


def candidate_scores(device: str, grid: str) -> list[LossSpec]:
    if grid == "tiny":
        return [LossSpec(100, 300, 16, 8, "float32")]
    if device == "cpu":
        return [LossSpec(14_500, 3_883, 50, 129, "float32"), LossSpec(2_500, 695_762, 64, 513, "float32")]
    return [LossSpec(32_768, 1_000_000, D, 513, "bfloat16") for D in (64, 256)]


def jagged(device: str, grid: str) -> list[JaggedSpec]:
    if grid == "tiny":
        dtype = "float32" if device == "cpu" else "bfloat16"
        return [JaggedSpec(operation, "ml-1m", 8, 48, 16, dtype) for operation in JAGGED]
    if device == "cpu":
        widths = (50, 256) if grid == "full" else (50,)
        return [JaggedSpec(o, "ml-1m", 128, 200, D, "float32") for o, D in product(JAGGED, widths)]
    wanted = [("ml-1m", 200, 256), ("uniform", 2048, 512)]
    if grid == "full":
        wanted = list(product(("ml-1m", "uniform"), (200, 2048, 16384), (64, 256, 512, 1024)))
    return [
        JaggedSpec(o, kind, sequences(kind, N), N, D, "bfloat16")
        for o, (kind, N, D) in product(JAGGED, wanted)
    ]


def bias_table_gradient(device: str, grid: str) -> list[TableSpec]:
    kinds = ("position", "time")
    if grid == "tiny":
        return [TableSpec(kind, 4, 40, "int64", "float32") for kind in kinds]
    if device == "cpu":
        core = [TableSpec(kind, 32, 200, "int64", "float32") for kind in kinds]
        return core + [TableSpec(kind, 2, 1024, "int32", "float32") for kind in kinds if grid == "full"]
    if grid == "core":
        return [TableSpec(kind, 16, 1024, "int32", "float32") for kind in kinds]
    inputs = product(kinds, ((16, 1024), (400, 200), (1, 4096)), ("int32", "int64"), ("float32", "bfloat16"))
    return [TableSpec(kind, B, N, index, dtype) for kind, (B, N), index, dtype in inputs]


def _octaves() -> tuple[int, ...]:
    return tuple(2**p for p in range(8, 15))  # 256 to 16384


def _full(N: int, H: int, D: int, bias: str) -> AttentionSpec:
    return AttentionSpec("full", TOKENS // N, N, H, D, bias, "bfloat16")


def _jagged(kind: str, N: int, H: int, D: int, bias: str) -> AttentionSpec:
    return AttentionSpec(kind, sequences(kind, N), N, H, D, bias, "bfloat16")
