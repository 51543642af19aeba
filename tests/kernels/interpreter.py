"""Triton's interpreter with bfloat16 that is right, and without work that it repeats.

The interpreter keeps bfloat16 numbers as their uint16 bits, and computes on the bits: sums, products and dots are
wrong by many orders of magnitude, conversions from float32 truncate.  Here operands become float32, and results are
rounded to the nearest bfloat16, ties to even, as the hardware does.  A reduction or a dot is done in float32 and
rounded once.  What moves numbers without computing (loads, stores, select, reshape, ...) works on bits rightly.
Atomic additions to bfloat16 remain unsupported by the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

Array = NDArray[Any]


def to_bits(values: Array) -> Array:
    """float32 -> bits of the nearest bfloat16 as uint16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16).reshape(values.shape)


def from_bits(bits: Array) -> Array:
    """Bits of bfloat16 as uint16 -> float32, exact."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).reshape(bits.shape)


def _is_bfloat16(handle: Any) -> bool:
    # a comparison's result carries its operands' type, and booleans
    return (
        isinstance(handle, TensorHandle)
        and handle.dtype.scalar == tl.bfloat16
        and handle.data.dtype == np.uint16
    )


def _widened(handle: Any) -> Any:
    return TensorHandle(from_bits(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrowed(handle: TensorHandle) -> TensorHandle:
    if handle.data.dtype == np.bool_:
        return TensorHandle(handle.data, tl.int1)
    return TensorHandle(to_bits(handle.data), tl.bfloat16)


def _in_float32(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """An operation of the builder, whose result has the type of its bfloat16 operands."""

    def operation(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        if not any(_is_bfloat16(operand) for operand in operands):
            return stock(self, *operands)
        return _narrowed(stock(self, *(_widened(operand) for operand in operands)))

    return operation


def _ternary_op(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    computing = _in_float32(stock)

    def ternary_op(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        return (stock if operands[-1] is np.where else computing)(self, *operands)  # select moves bits

    return ternary_op


def _convert_float(stock: Callable[..., Array]) -> Callable[..., Array]:
    """The bits of ``input`` converted between types of floats."""

    def convert(values: Array, source: Any, target: Any, rounding: Any) -> Array:
        if source == tl.bfloat16:
            wide = from_bits(values)
            return stock(wide, tl.float32, target, rounding) if target != tl.float32 else wide.view(np.uint32)
        if target == tl.bfloat16:
            if source != tl.float32:
                values = stock(values, source, tl.float32, None).view(np.float32)
            if rounding == interpreter._ir.ROUNDING_MODE.RTZ:
                return (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
            return to_bits(values)
        return stock(values, source, target, rounding)

    return convert


def _cast(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast_impl(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        source = _widened(source)
        if target.scalar == tl.bfloat16:
            return TensorHandle(to_bits(source.data.astype(np.float32)), tl.bfloat16)
        return stock(self, source, target)

    return cast_impl


def _dot(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_dot(self: InterpreterBuilder, a: Any, b: Any, d: Any, *settings: Any) -> TensorHandle:
        result = stock(self, _widened(a), _widened(b), _widened(d), *settings)
        return _narrowed(result) if _is_bfloat16(d) else result

    return create_dot


def _reduction(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ReduceOps or ScanOps that hands the numbers to numpy: `sum`, `min_max`, `cumsum`, `cumprod`."""

    def method(self: Any, operand: Any, *arguments: Any, **settings: Any) -> Any:
        tensor = operand[0] if isinstance(operand, tuple) else operand
        if not _is_bfloat16(tensor.handle):
            return stock(self, operand, *arguments, **settings)
        shape = list(tensor.handle.data.shape)
        wide = tl.core.tensor(_widened(tensor.handle), tl.block_type(tl.float32, shape))
        results = stock(self, wide, *arguments, **settings)
        if isinstance(results, tl.core.tensor):
            return narrow(results)
        return type(results)(narrow(result) for result in results)

    def narrow(result: Any) -> Any:
        if result.dtype != tl.float32:  # an index
            return result
        type_ = tl.block_type(tl.bfloat16, list(result.shape)) if result.type.is_block() else tl.bfloat16
        return tl.core.tensor(_narrowed(result.handle), type_)

    return method


def _get_bf16(self: InterpreterBuilder, value: float) -> TensorHandle:
    return TensorHandle(to_bits(np.array([value], dtype=np.float32)), tl.bfloat16)


def _patched_once(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A launch replaces the builtins of the language and puts them back; each call of a function in the kernel walked
    through all of them again, to replace what was replaced already."""
    launched: list[frozenset] = []

    @cache
    def languages(function: Any) -> frozenset:
        return frozenset(id(lang) for lang in (tl, tl.core) if lang in function.__globals__.values())

    def patch_lang(function: Any) -> Any:
        if launched:
            return interpreter._LangPatchScope() if languages(function) <= launched[0] else stock(function)
        scope = stock(function)
        restore = scope.restore

        def ended() -> None:
            launched.clear()
            restore()

        scope.restore = ended
        launched.append(languages(function))
        return scope

    return patch_lang


def _type_of_numbers(stock: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """NumPy's type of Triton's: looked up by name instead of in a table made for each operation."""
    known = cache(lambda name: stock(tl.dtype(name)))
    return lambda type_: np.dtype(np.uint64) if type_.scalar.is_ptr() else known(type_.scalar.name)


def _when_debugging(stock: Callable[..., None]) -> Callable[..., None]:
    """Of each sum and product of integers: whether it overflowed, worked out in 64 bits, and forgotten but in debug."""

    def sanitize(self: TritonSemantic, *operands: Any) -> None:
        if self.builder.options.debug:
            stock(self, *operands)

    return sanitize


def repair() -> None:
    """Patches Triton's interpreter, once."""
    if not hasattr(InterpreterBuilder, "repaired"):
        InterpreterBuilder.repaired = True
        repair_bfloat16()
        interpreter._patch_lang = _patched_once(interpreter._patch_lang)
        TritonSemantic.binary_op_sanitize_overflow_impl = _when_debugging(
            TritonSemantic.binary_op_sanitize_overflow_impl
        )
        interpreter._get_np_dtype = _type_of_numbers(interpreter._get_np_dtype)


def repair_bfloat16() -> None:
    """A Triton that represents bfloat16 otherwise is left alone."""
    if interpreter._get_np_dtype(tl.bfloat16) != np.uint16 or hasattr(InterpreterBuilder, "get_bf16"):
        return
    replaced = {"cast_impl": _cast, "create_dot": _dot, "ternary_op": _ternary_op}
    replaced |= dict.fromkeys(
        ("binary_op", "unary_op", "create_fma", "create_erf", "create_rsqrt"), _in_float32
    )
    for name, repair in replaced.items():
        setattr(InterpreterBuilder, name, repair(getattr(InterpreterBuilder, name)))
    for owner, name in (
        (ReduceOps, "sum"),
        (ReduceOps, "min_max"),
        (ScanOps, "cumsum"),
        (ScanOps, "cumprod"),
    ):
        setattr(owner, name, _reduction(getattr(owner, name)))
    interpreter._convert_float = _convert_float(interpreter._convert_float)
    InterpreterBuilder.get_bf16 = _get_bf16
