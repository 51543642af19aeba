"""The Triton kernels to compile without a GPU, with the tiles a launch would choose; see CompileCase."""

from __future__ import annotations

from typing import Any

from gr_kernels.hstu_attention import tiles, triton_kernel
from gr_kernels.hstu_attention.settings import Settings
from gr_kernels.triton_common.compile_case import CompileCase

_KERNELS: dict[tiles.Pass, Any] = {
    "forward": triton_kernel.forward_kernel,
    "d_q": triton_kernel.d_q_kernel,
    "d_kv": triton_kernel.d_kv_kernel,
    "tables": triton_kernel.table_gradients_kernel,
}
_PASSES: tuple[tiles.Pass, ...] = ("forward", "d_q", "d_kv")
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# In the numbers' own type; the others by name, else 32-bit integers.
_NUMBERS = {"q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v"}
_TYPES = {
    **dict.fromkeys(("lse", "delta", "position", "time", "position_sums", "time_sums"), "*fp32"),
    **dict.fromkeys(("offsets", "query_offsets", "targets", "order"), "*i64"),
    **dict.fromkeys(("query_times", "key_times", "thresholds"), "*i64"),
    **dict.fromkeys(("scale", "weight_scale", "score_scale", "keep_scale"), "fp32"),
    **dict.fromkeys(("buckets_per_unit", "bucket_margin"), "fp32"),
    **dict.fromkeys(("key_low", "key_high", "drop_last"), "u32"),
    "rows": "i64",
}

# Bytes spilled, where any are. On sm_90 nothing that is hot spills: width 256 does, and every feature at once. The
# tiles are sm_90's; on sm_80, whose products need more registers, some cases spill a little.
_SPILLS = {
    "d_kv.bf16.d256.sm_90": 168,
    "tables.bf16.d256.both.sm_90": 72,
    "forward.bf16.d64.everything.sm_90": 16,
    "d_kv.bf16.d64.everything.sm_90": 244,
    "forward.bf16.d64.everything.sm_80": 48,
    "d_kv.bf16.d64.everything.sm_80": 2564,
    "d_q.bf16.d128.sm_80": 76,
    "d_q.bf16.d128.softmax.sm_80": 112,
    "d_kv.bf16.d64.position.sm_80": 12,
    "d_kv.bf16.d64.both.sm_80": 44,
    "d_kv.bf16.d64.short.both.sm_80": 44,
    "tables.bf16.d64.both.sm_80": 336,
    "tables.bf16.d128.both.sm_80": 512,
    "tables.bf16.d256.both.sm_80": 6728,
}


def _absent(settings: Settings) -> set[str]:
    """Pointers that a launch with these settings gives as None."""
    absent = {"query_offsets"} if not settings.CROSS else set()
    absent |= {"targets"} if not settings.TARGETS else set()
    absent |= {"lse", "delta"} if not settings.SOFTMAX else set()
    absent |= {"position", "position_sums"} if not settings.POSITION else set()
    if not settings.TIME:
        absent |= {"time", "time_sums", "query_times", "key_times", "thresholds"}
    return absent


def _case(
    which: tiles.Pass,
    dtype: str,
    width: int,
    hot: bool,
    label: str = "",
    longest: int = 4096,
    **flags: Any,
) -> list[CompileCase]:
    """A pass for heads of one width, for both architectures; flags are Settings'."""
    kernel = _KERNELS[which]
    biased = flags.get("POSITION", False) or flags.get("TIME", False)
    tile = tiles.choose(which, width, _BYTES[dtype], longest, biased, flags.get("SOFTMAX", False))
    settings = Settings(
        ROWS=tile.rows,
        KEYS=tile.keys,
        WIDTH_Q=width,
        WIDTH_V=width,
        BLOCK_Q=width,
        BLOCK_V=width,
        FAST=dtype != "fp32",
        ORDERED=True,
        **flags,
    )
    absent = _absent(settings)
    signature = {
        name: _TYPES.get(name, "i32") for name in kernel.arg_names if name != "S" and name not in absent
    }
    signature |= {name: f"*{dtype}" for name in signature if name in _NUMBERS}
    if settings.ATOMIC:
        signature["d_q"] = "*fp32"
    name = ".".join(filter(None, (which, dtype, f"d{width}", label)))
    return [
        CompileCase(
            name=name,
            kernel=kernel,
            signature=signature,
            constexprs={"S": settings, **dict.fromkeys(absent & set(kernel.arg_names))},
            num_warps=tile.warps,
            num_stages=tile.stages,
            hot=hot,
            spill_budget=_SPILLS.get(f"{name}.sm_{architecture}", 0),
            divisible_by_16=tuple(each for each in signature if each.endswith(("_row", "_head"))),
            architectures=(architecture,),
        )
        for architecture in (80, 90)
    ]


def _cases() -> list[CompileCase]:
    both = {"POSITION": True, "TIME": True}
    mask = {"TARGETS": True, "WINDOW": True, "CONTEXTS": True}
    cases: list[CompileCase] = []
    for which in _PASSES:
        for width in (64, 128):
            cases.extend(_case(which, "bf16", width, True))
            cases.extend(_case(which, "bf16", width, True, "position", POSITION=True))
            cases.extend(_case(which, "bf16", width, True, "both", **both))
            cases.extend(_case(which, "bf16", width, True, "softmax", SOFTMAX=True))
        cases.extend(_case(which, "bf16", 64, True, "short", longest=200))
        cases.extend(_case(which, "bf16", 64, True, "short.both", longest=200, **both))
        cases.extend(_case(which, "bf16", 64, True, "masks", **mask))
        everything = {**both, **mask, "SOFTMAX": True, "DROPOUT": True, "CROSS": True}
        cases.extend(_case(which, "bf16", 64, False, "everything", **everything))
        cases.extend(_case(which, "bf16", 256, False))
        cases.extend(_case(which, "fp16", 64, False))
        cases.extend(_case(which, "fp32", 64, False))
        cases.extend(_case(which, "fp32", 256, False))
    for width in (64, 128):
        if tiles.atomic(width, biased=False):
            cases.extend(_case("d_kv", "bf16", width, True, "atomic", ATOMIC=True))
        cases.extend(_case("tables", "bf16", width, True, "both", **both))
    cases.extend(_case("tables", "bf16", 256, False, "both", **both))
    cases.extend(_case("tables", "fp32", 64, False, "both", **both))
    return cases


CASES = _cases()
