"""The Triton kernels to compile without a GPU, with the tiles a launch would choose; see CompileCase."""

from __future__ import annotations

from typing import Any

from benchmarks.kernels.compile_cases.case import CompileCase
from gr_kernels.hstu_attention import tiles, triton_kernel
from gr_kernels.hstu_attention.settings import Settings
from gr_kernels.triton_common.sizes import power_of_two

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
    **dict.fromkeys(("offsets", "query_offsets", "targets", "parts", "order"), "*i64"),
    **dict.fromkeys(("query_times", "key_times", "thresholds"), "*i64"),
    **dict.fromkeys(("scale", "weight_scale", "score_scale", "keep_scale"), "fp32"),
    **dict.fromkeys(("buckets_per_unit", "bucket_margin"), "fp32"),
    **dict.fromkeys(("key_low", "key_high", "drop_last"), "u32"),
    "rows": "i64",
}

# Bytes spilled, where any are. On sm_90 nothing that is hot spills: width 256 does, every feature at once at width 128,
# and a little what few models ask for (the root's buckets in float16; the table gradients under dropout, rows in pieces
# of 4 bytes). The tiles are sm_90's; on sm_80, whose products need more registers, more spills.
_SPILLS = {
    "forward.bf16.d256.everything.sm_90": 372,
    "forward.fp32.d256.everything.sm_90": 32,
    "d_q.bf16.d256.everything.sm_90": 616,
    "d_kv.bf16.d256.sm_90": 168,
    "d_kv.bf16.d256.everything.sm_90": 624,
    "tables.bf16.d256.both.sm_90": 72,
    "tables.bf16.d32x256.both.sm_90": 48,
    "tables.bf16.d50.short.both.dropout.sm_90": 264,
    "forward.bf16.d128.dropout.sm_80": 16,
    "forward.bf16.d256.everything.sm_80": 10624,
    "d_q.bf16.d32.both.sm_80": 96,
    "d_q.bf16.d50.softmax.sm_80": 28,
    "d_q.bf16.d64.dropout.sm_80": 444,
    "d_q.bf16.d128.sm_80": 76,
    "d_q.bf16.d128.softmax.sm_80": 112,
    "d_q.bf16.d128.everything.sm_80": 500,
    "d_q.bf16.d256.everything.sm_80": 124,
    "d_kv.bf16.d50.atomic.sm_80": 380,
    "d_kv.bf16.d50.short.both.dropout.sm_80": 48,
    "d_kv.bf16.d64.position.sm_80": 12,
    "d_kv.bf16.d64.both.sm_80": 76,
    "d_kv.bf16.d64.both.dropout.sm_80": 24,
    "d_kv.bf16.d64.short.both.sm_80": 76,
    "d_kv.bf16.d64.dropout.sm_80": 1812,
    "d_kv.bf16.d64.atomic.dropout.sm_80": 1980,
    "d_kv.bf16.d64.everything.sm_80": 260,
    "d_kv.bf16.d64x128.position.sm_80": 16,
    "d_kv.bf16.d128.everything.sm_80": 180,
    "d_kv.bf16.d256.everything.sm_80": 636,
    "d_kv.fp16.d64.both.sqrt.sm_80": 88,
    "tables.bf16.d64.both.sm_80": 280,
    "tables.bf16.d128.both.sm_80": 440,
    "tables.bf16.d256.both.sm_80": 6648,
    "tables.bf16.d32x256.both.sm_80": 1648,
    "tables.bf16.d50.short.both.sm_80": 416,
    "tables.bf16.d50.short.both.dropout.sm_80": 704,
    "tables.bf16.d25.short.both.sm_80": 424,
}


def _absent(settings: Settings) -> set[str]:
    """Pointers that a launch with these settings gives as None."""
    absent = {"query_offsets"} if not settings.CROSS else set()
    absent |= {"targets"} if not settings.TARGETS else set()
    absent |= {"parts"} if not settings.PART else set()
    absent |= {"lse", "delta"} if not settings.SOFTMAX else set()
    absent |= {"position", "position_sums"} if not settings.POSITION else set()
    if not settings.TIME:
        absent |= {"time", "time_sums", "query_times", "key_times", "thresholds"}
    return absent


def _case(
    which: tiles.Pass,
    dtype: str,
    widths: int | tuple[int, int],
    hot: bool,
    label: str = "",
    longest: int = 4096,
    aligned: int = 16,
    **flags: Any,
) -> list[CompileCase]:
    """A pass for heads of one width, or of one for queries and keys and one for values, for both architectures.

    aligned: by how many bytes q, k, v and all strides are divisible, at most 16; flags are Settings'.
    """
    kernel = _KERNELS[which]
    width_q, width_v = (widths, widths) if isinstance(widths, int) else widths
    block_q, block_v = (max(16, power_of_two(width)) for width in (width_q, width_v))
    tile = tiles.choose(
        which,
        max(block_q, block_v),
        _BYTES[dtype],
        longest,
        biased=flags.get("POSITION", False) or flags.get("TIME", False),
        softmax=flags.get("SOFTMAX", False),
        dropout=flags.get("DROPOUT", False),
        ragged=(width_q, width_v) != (block_q, block_v),
    )
    settings = Settings(
        ROWS=tile.rows,
        KEYS=tile.keys,
        WIDTH_Q=width_q,
        WIDTH_V=width_v,
        BLOCK_Q=block_q,
        BLOCK_V=block_v,
        FAST=dtype != "fp32",
        ORDERED=True,
        ALIGNED=aligned,
        **flags,
    )
    absent = _absent(settings)
    signature = {
        name: _TYPES.get(name, "i32") for name in kernel.arg_names if name != "S" and name not in absent
    }
    signature |= {name: f"*{dtype}" for name in signature if name in _NUMBERS}
    if settings.ATOMIC:
        signature["d_q"] = "*fp32"
    strides = tuple(each for each in signature if each.endswith(("_row", "_head")))
    named = f"d{width_q}" if width_q == width_v else f"d{width_q}x{width_v}"
    name = ".".join(filter(None, (which, dtype, named, label)))
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
            divisible_by_16=strides if aligned == 16 else (),
            architectures=(architecture,),
            unaligned=() if aligned == 16 else ("q", "k", "v"),
        )
        for architecture in (80, 90)
    ]


def _delta(dtype: str, width: int) -> CompileCase:
    """The sums that softmax's backward starts with."""
    tile = tiles.choose("forward", width, _BYTES[dtype], 4096, biased=False, softmax=True)
    return CompileCase(
        name=f"delta.{dtype}.d{width}",
        kernel=triton_kernel.delta_kernel,
        signature={
            **dict.fromkeys(("out", "d_out"), f"*{dtype}"),
            "delta": "*fp32",
            **dict.fromkeys(("out_row", "out_head"), "i32"),
            "rows": "i64",
        },
        constexprs={
            "S": Settings(
                ROWS=tile.rows,
                KEYS=tile.keys,
                WIDTH_Q=width,
                WIDTH_V=width,
                BLOCK_Q=width,
                BLOCK_V=width,
                SOFTMAX=True,
                ALIGNED=16,
            )
        },
        num_warps=4,
        num_stages=3,
        hot=False,
        divisible_by_16=("out_row", "out_head"),
    )


def _zero_outside(dtype: str) -> CompileCase:
    return CompileCase(
        name=f"zero_outside.{dtype}",
        kernel=triton_kernel.zero_outside_kernel,
        signature={"x": f"*{dtype}", "offsets": "*i64", "sequences": "i32", "rows": "i64", "width": "i32"},
        constexprs={},
        num_warps=4,
        num_stages=3,
        hot=False,
        divisible_by_16=("width",),
    )


def _cases() -> list[CompileCase]:
    both = {"POSITION": True, "TIME": True}
    mask = {"TARGETS": True, "WINDOW": True, "CONTEXTS": True}
    everything = {**both, **mask, "SOFTMAX": True, "DROPOUT": True, "CROSS": True}
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
        for width in (64, 128, 256):
            cases.extend(_case(which, "bf16", width, False, "everything", **everything))
        for width in (64, 128):
            cases.extend(_case(which, "bf16", width, True, "dropout", DROPOUT=True))
        cases.extend(_case(which, "bf16", 64, True, "both.dropout", **both, DROPOUT=True))
        cases.extend(_case(which, "bf16", 256, False))
        cases.extend(_case(which, "fp16", 64, False))
        cases.extend(_case(which, "fp32", 64, False))
        cases.extend(_case(which, "fp32", 256, False))
    for width in (64, 128):
        cases.extend(_case("d_kv", "bf16", width, True, "atomic", ATOMIC=True))
        # 32 rows by 128 keep to the registers there, and d_q's 32 rows are an mma.sync: one product in five.
        cases.extend(_case("d_kv", "bf16", width, width == 64, "atomic.softmax", ATOMIC=True, SOFTMAX=True))
        cases.extend(_case("d_kv", "bf16", width, width == 64, "atomic.dropout", ATOMIC=True, DROPOUT=True))
        cases.extend(_case("tables", "bf16", width, True, "both", **both))
    # The models' default: one head of width 50 out of a projection to 4 x 50 columns, histories of 200. And two of 25.
    for which in (*_PASSES, "tables"):
        cases.extend(_case(which, "bf16", 50, True, "short.both", longest=200, aligned=4, **both))
        cases.extend(_case(which, "bf16", 25, True, "short.both", longest=200, aligned=2, **both))
        dropped = {**both, "DROPOUT": True}
        hot = which != "tables"  # its registers don't suffice
        cases.extend(_case(which, "bf16", 50, hot, "short.both.dropout", longest=200, aligned=4, **dropped))
    for which in _PASSES:
        cases.extend(_case(which, "bf16", 50, True, "softmax", longest=200, aligned=4, SOFTMAX=True))
        cases.extend(_case(which, "bf16", 50, True, "long.both", aligned=4, **both))
        for widths in (16, 32):
            cases.extend(_case(which, "bf16", widths, True, "both", **both))
        for pair in ((64, 128), (32, 64)):
            cases.extend(_case(which, "bf16", pair, True, "position", POSITION=True))
    cases.extend(_case("d_kv", "bf16", 50, True, "atomic", aligned=4, ATOMIC=True))
    cases.extend((_delta("bf16", 64), _delta("bf16", 256), _delta("fp32", 256)))
    cases.extend((_zero_outside("bf16"), _zero_outside("fp32")))
    cases.extend(_case("tables", "bf16", 256, False, "both", **both))
    cases.extend(_case("tables", "bf16", (32, 256), False, "both", **both))
    cases.extend(_case("tables", "fp32", 64, False, "both", **both))
    cases.extend(_case("d_kv", "fp16", 64, False, "both.sqrt", SQRT=True, **both))
    cases.extend(_case("forward", "fp32", 256, False, "everything", **everything))
    return cases


CASES = _cases()
