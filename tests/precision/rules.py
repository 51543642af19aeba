"""The bounds of single operations: what errors of the operands become in them, and the operation's own rounding.

A rule gets the analysis (``a.error(x)``: the bound of x; ``a.sums``: the unit round-off of sums), the exact result
and the operation's arguments; it returns the bound of the result.  E: errors, |x|: sizes, u: unit round-off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.precision.bound import DEVIATIONS, growth

aten = torch.ops.aten
FLUSHED = 2.0**-126  # below float32's smallest normal number processors and kernels may give 0
FUNCTION = (
    4.0  # unit round-offs of an exponential, a logarithm or a root, of the libraries' and the kernels' own
)


def size(x: Any) -> Tensor:
    """|x|; 0 where x isn't finite: an infinity is no rounding's doing."""
    x = torch.as_tensor(x, dtype=torch.float64).abs()
    return x.masked_fill(~x.isfinite(), 0.0)


def _operand(a: Any, x: Any) -> Tensor:
    """The bound of an operand; a constant of the program has been rounded once."""
    return a.error(x) if isinstance(x, Tensor) else a.sums * size(x)


def _add(a: Any, out: Tensor, x: Any, y: Any, alpha: float = 1) -> Tensor:
    e_y = abs(alpha) * _operand(a, y)
    return _operand(a, x) + e_y + a.sums * (size(out) + (size(out) + size(x) if alpha not in (1, -1) else 0))


def _mul(a: Any, out: Tensor, x: Any, y: Any) -> Tensor:
    ex, ey = _operand(a, x), _operand(a, y)
    return size(x) * ey + size(y) * ex + ex * ey + a.sums * size(out) + FLUSHED * (out != 0)


def _div(a: Any, out: Tensor, x: Any, y: Any) -> Tensor:
    # (x + ex) / (y - ey) - x / y
    ex, ey = _operand(a, x), _operand(a, y)
    error = (ex + size(out) * ey) / (size(y) - ey).clamp_min(0.0)
    return torch.where((ex == 0) & (ey == 0), 0.0, error) + a.sums * size(out) + FLUSHED * (out != 0)


def _exp(a: Any, out: Tensor, x: Tensor) -> Tensor:
    # an argument in another base, as kernels have it, has been rounded once more
    return size(out) * (a.error(x).expm1() + (FUNCTION + size(x)) * a.sums) + FLUSHED * (out != 0)


def _log(a: Any, out: Tensor, x: Tensor) -> Tensor:
    ex = a.error(x)
    moved = torch.where(ex == 0, 0.0, -(-ex / size(x)).clamp_min(-1.0).log1p())
    return moved + FUNCTION * a.sums * size(out)


def _sqrt(a: Any, out: Tensor, x: Tensor) -> Tensor:
    ex = a.error(x)
    return torch.where(ex == 0, 0.0, ex / out.clamp_min(1e-300)) + FUNCTION * a.sums * size(out)


def _sigmoid(a: Any, out: Tensor, x: Tensor) -> Tensor:
    slope = out * (1 - out)
    return torch.minimum(a.error(x) / 4, slope * a.error(x).expm1()) + a.sums * (
        FUNCTION * out + size(x) * slope
    )


def _silu(a: Any, out: Tensor, x: Tensor) -> Tensor:
    gate = x.sigmoid()
    moved = 1.1 * a.error(x)  # the steepest slope is 1.0998
    return moved + a.sums * size(x) * ((FUNCTION + 1) * gate + size(x) * gate * (1 - gate))


def _silu_backward(a: Any, out: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    gate = x.sigmoid()
    slope = gate * (1 + x * (1 - gate))
    sizes = gate * (1 + size(x) * (1 - gate))
    e_slope = a.error(x) / 2 + a.sums * (FUNCTION + 3 + size(x)) * sizes  # |SiLU''| <= 1/2
    e_grad = a.error(grad)
    error = size(grad) * e_slope + e_grad * slope.abs() + e_grad * e_slope + a.sums * size(out)
    return error if a.wide or not a.narrow else error + a.stored * size(out)


def _square(a: Any, out: Tensor, x: Tensor, exponent: float = 2) -> Tensor:
    if exponent != 2:
        raise NotImplementedError(f"no rule for the power {exponent}")
    ex = a.error(x)
    return 2 * size(x) * ex + ex * ex + a.sums * size(out)


def _sum(a: Any, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **rest: Any) -> Tensor:
    dim = list(range(x.dim())) if dim is None or dim == [] else dim
    terms = (x != 0).sum(dim, keepdim=keepdim)  # adding a zero is exact
    return a.error(x).sum(dim, keepdim=keepdim) + growth(terms) * a.sums * size(x).sum(dim, keepdim=keepdim)


def _mean(a: Any, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **rest: Any) -> Tensor:
    return _sum(a, out, x, dim, keepdim) * out.numel() / max(1, x.numel()) + a.sums * size(out)


def _product(a: Any, out: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A matrix product, of batches too: sums of as many terms as x has columns."""
    sizes = size(x) @ size(y)
    error = growth(x.shape[-1]) * a.sums * sizes
    computed = [a.derived(x), a.derived(y)]
    if computed[0]:
        error = error + a.error(x) @ (size(y) + a.error(y))
    if computed[1]:
        error = error + size(x) @ a.error(y)
    if a.narrow and any(computed):
        root = (size(x).square() @ size(y).square()).sqrt()
        roundings = math.sqrt(sum(computed))
        error = error + a.stored * torch.minimum(DEVIATIONS * roundings * root, sum(computed) * sizes)
        if computed[0]:  # a factor among float16's smallest numbers, or below them
            error = error + a.tiny * (x != 0).double() @ size(y)
        if computed[1]:
            error = error + a.tiny * size(x) @ (y != 0).double()
    if a.narrow and (any(computed) or not a.wide):
        error = error + a.stored * size(out) + a.tiny
    return error


def _addmm(
    a: Any, out: Tensor, bias: Tensor, x: Tensor, y: Tensor, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = x @ y
    error = abs(alpha) * _product(a, product, x, y) + abs(beta) * a.error(bias)
    if a.narrow and not a.wide:
        error = error + a.stored * size(out)
    return error + a.sums * (abs(alpha) * size(product) + size(out))


def _logsumexp(a: Any, out: Tensor, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """The largest taken off, exponentials, their sum, its logarithm, the largest put back."""
    whole = out if keepdim else x.logsumexp(dim, keepdim=True)
    peak = x.amax(dim, keepdim=True)
    shares = (x - whole).exp().nan_to_num(0.0)
    moved = (x + a.error(x)).logsumexp(dim, keepdim=True) - whole
    terms = (shares != 0).sum(dim, keepdim=True)
    distance = (shares * size(x - peak)).sum(dim, keepdim=True)
    own = growth(terms) + 2 * FUNCTION + 2 * distance + 2 * size(whole) + 2 * size(peak)
    error = moved.nan_to_num(0.0) + a.sums * own
    return error.reshape(out.shape)


def _log_softmax(a: Any, out: Tensor, x: Tensor, dim: int, half: bool = False) -> Tensor:
    whole = x.logsumexp(dim, keepdim=True)
    peak = x.amax(dim, keepdim=True)
    error = a.error(x) + _logsumexp(a, whole, x, dim, True) + a.sums * (2 * size(out) + size(x - peak))
    return torch.where(out.isfinite(), error, 0.0)


def _log_softmax_backward(a: Any, out: Tensor, grad: Tensor, output: Tensor, dim: int, dtype: Any) -> Tensor:
    """grad - exp(output) sum(grad)."""
    total = grad.sum(dim, keepdim=True)
    e_total = _sum(a, total, grad, [dim], True)
    shares = output.exp()
    e_shares = _exp(a, shares, output)
    moved = shares * e_total + size(total) * e_shares + e_shares * e_total
    return a.error(grad) + moved + a.sums * (2 * size(shares * total) + size(out))


def _softmax(a: Any, out: Tensor, x: Tensor, dim: int, half: bool = False) -> Tensor:
    whole, peak = x.logsumexp(dim, keepdim=True), x.amax(dim, keepdim=True)
    moved = a.error(x) + ((x + a.error(x)).logsumexp(dim, keepdim=True) - whole).nan_to_num(0.0)
    distance = (out * size(x - peak)).sum(dim, keepdim=True)
    own = growth((out != 0).sum(dim, keepdim=True)) + 2 * FUNCTION + 2 * size(x - peak) + 2 * distance
    return out * (moved.expm1() + a.sums * own) + FLUSHED * (out != 0)


def _softmax_backward(a: Any, out: Tensor, grad: Tensor, output: Tensor, dim: int, dtype: Any) -> Tensor:
    """output (grad - sum(output grad))."""
    products = output * grad
    e_grad, e_output = a.error(grad), a.error(output)
    e_products = size(output) * e_grad + (size(grad) + e_grad) * e_output + a.sums * size(products)
    mean = products.sum(dim, keepdim=True)
    terms = (products != 0).sum(dim, keepdim=True)
    e_mean = e_products.sum(dim, keepdim=True) + growth(terms) * a.sums * size(products).sum(
        dim, keepdim=True
    )
    e_rest = e_grad + e_mean + a.sums * size(grad - mean)
    return size(output) * e_rest + e_output * (size(grad - mean) + e_rest) + a.sums * size(out)


def _vector_norm(
    a: Any, out: Tensor, x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    assert ord == 2
    dim = list(range(x.dim())) if dim is None else dim
    terms = growth((x != 0).sum(dim, keepdim=keepdim))
    moved = torch.linalg.vector_norm(a.error(x), 2, dim, keepdim)
    return moved + (terms / 2 + FUNCTION) * a.sums * size(out)


def _statistics(a: Any, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Errors of the mean, of 1 / deviation, of the centred and of the standardised values, from those of x."""
    width, u = x.shape[-1], a.sums
    centred = x - mean
    e_mean = a.error(x).mean(-1, keepdim=True) + growth(width) * u * size(x).mean(-1, keepdim=True)
    e_centred = a.error(x) + e_mean + u * size(centred)
    squares = centred.square().mean(-1, keepdim=True)
    e_squares = (2 * size(centred) * e_centred + e_centred.square()).mean(-1, keepdim=True)
    variance = 1 / rstd.square()
    shift = (e_squares + (growth(width) + 1) * u * squares) / variance
    e_rstd = rstd * ((1 - shift).clamp_min(1e-30).rsqrt() - 1 + FUNCTION * u)
    e_standard = e_centred * (rstd + e_rstd) + size(centred) * (e_rstd + u * rstd)
    return e_mean, e_rstd, e_centred, e_standard


def _layer_norm(
    a: Any, out: Any, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normed, mean, rstd = out
    e_mean, e_rstd, _, error = _statistics(a, x, mean, rstd)
    if weight is not None:
        standard = (x - mean) * rstd
        error = error * (size(weight) + a.error(weight)) + size(standard) * a.error(weight)
        error = error + a.sums * size(standard * weight)
    return error + a.error(bias) + a.sums * size(normed), e_mean, e_rstd


def _layer_norm_backward(
    a: Any, out: Any, grad: Tensor, x: Tensor, shape: Any, mean: Tensor, rstd: Tensor, weight: Any, bias: Any,
    mask: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx = (g - mean(g) - x^ mean(g x^)) / deviation, g = grad weight, x^ the standardised x."""
    width, u = x.shape[-1], a.sums
    _, e_rstd, _, e_standard = _statistics(a, x, mean, rstd)
    standard = (x - mean) * rstd
    if a.narrow:  # what is kept between the passes
        e_standard = e_standard + a.stored * size(standard)
    w = torch.ones((), dtype=x.dtype) if weight is None else weight
    g, e_grad = grad * w, a.error(grad)
    e_g = e_grad * (size(w) + a.error(weight)) + size(grad) * a.error(weight) + u * size(g)
    products = g * standard
    e_products = e_g * (size(standard) + e_standard) + size(g) * e_standard + u * size(products)
    along = products.mean(-1, keepdim=True)
    e_mean_g = e_g.mean(-1, keepdim=True) + growth(width) * u * size(g).mean(-1, keepdim=True)
    e_along = e_products.mean(-1, keepdim=True) + growth(width) * u * size(products).mean(-1, keepdim=True)
    rest = g - g.mean(-1, keepdim=True) - standard * along
    sizes = size(g) + size(g.mean(-1, keepdim=True)) + size(standard * along)
    e_rest = (
        e_g + e_mean_g + (size(standard) + e_standard) * e_along + e_standard * size(along) + 3 * u * sizes
    )
    e_x = e_rest * (rstd + e_rstd) + size(rest) * e_rstd + 2 * u * size(rest) * rstd
    terms = growth(len(x)) * u
    e_terms = e_grad * (size(standard) + e_standard) + size(grad) * e_standard + u * size(grad * standard)
    e_weight = e_terms.sum(0) + terms * size(grad * standard).sum(0)
    e_bias = e_grad.sum(0) + terms * size(grad).sum(0)
    return e_x, (e_weight if mask[1] else None), (e_bias if mask[2] else None)


def _nll(a: Any, out: Any, x: Tensor, target: Tensor, weight: Any, reduction: int, ignore: int) -> Any:
    error = aten.nll_loss_forward(-a.error(x), target, weight, 0, ignore)[0]
    if reduction == 0:
        return error, torch.zeros(())
    sizes = aten.nll_loss_forward(-size(x), target, weight, 0, ignore)[0]
    scale = 1.0 if reduction == 2 else 1 / len(target)
    return (error.sum() + growth(len(target)) * a.sums * sizes.sum()) * scale, torch.zeros(())


def _nll_backward(a: Any, out: Tensor, grad: Tensor, *rest: Any) -> Tensor:
    return aten.nll_loss_backward(a.error(grad), *rest).abs() + a.sums * size(out)


def _accumulating(operation: Callable[..., Tensor], values_at: int) -> Callable[..., Tensor]:
    """A sum into places of the first argument: operation(x, ..., values, ...)."""

    def rule(a: Any, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        values = args[values_at]

        def apply(start: Tensor, some: Tensor) -> Tensor:
            return operation(start, *args[:values_at], some, *args[values_at + 1 :], **kwargs)

        errors = apply(a.error(x).clone(), a.error(values).expand(values.shape))
        sizes = apply(size(x), size(values))
        terms = apply((x != 0).double(), (values != 0).double())
        return errors.abs() + growth(terms) * a.sums * sizes

    return rule


def _index_put(
    a: Any, out: Tensor, x: Tensor, indices: Any, values: Tensor, accumulate: bool = False
) -> Tensor:
    if not accumulate:
        return aten.index_put(a.error(x), indices, a.error(values).expand(values.shape))
    return _index_put_accumulate(a, out, x, indices, values, True)


_index_put_accumulate = _accumulating(aten.index_put, 1)


def _embedding_backward(a: Any, out: Tensor, grad: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    def apply(x: Tensor) -> Tensor:
        return aten.embedding_dense_backward(x, indices, *rest)

    return apply(a.error(grad).contiguous()) + growth(apply((grad != 0).double())) * a.sums * apply(
        size(grad)
    )


def _moves(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Numbers go elsewhere, unchanged: their errors with them.  What fills gaps is exact."""

    def rule(a: Any, out: Any, *args: Any, **kwargs: Any) -> Any:
        def error(x: Any) -> Any:
            if isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x):
                return [error(y) for y in x]
            return a.error(x) if isinstance(x, Tensor) and x.dtype == torch.float64 else x

        return operation(*(error(x) for x in args), **{name: error(x) for name, x in kwargs.items()})

    return rule


def _to_copy(a: Any, out: Tensor, x: Tensor, **rest: Any) -> Tensor | None:
    if out.dtype == torch.float64:
        return a.error(x).expand(x.shape)
    if out.is_floating_point() and a.derived(x):
        raise NotImplementedError(f"the definition itself rounds to {out.dtype}")
    return None


def _none(a: Any, out: Any, *args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros((), dtype=torch.float64)


RULES: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _add,
    "rsub": _add,
    "mul": _mul,
    "div": _div,
    "reciprocal": lambda a, out, x: _div(a, out, 1.0, x),
    "neg": _moves(torch.abs),
    "abs": _moves(torch.abs),
    "exp": _exp,
    "log": _log,
    "sqrt": _sqrt,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "silu_backward": _silu_backward,
    "pow": _square,
    "square": _square,
    "sum": _sum,
    "mean": _mean,
    "mm": _product,
    "bmm": _product,
    "addmm": _addmm,
    "logsumexp": _logsumexp,
    "_log_softmax": _log_softmax,
    "_log_softmax_backward_data": _log_softmax_backward,
    "_softmax": _softmax,
    "_softmax_backward_data": _softmax_backward,
    "linalg_vector_norm": _vector_norm,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "nll_loss_forward": _nll,
    "nll_loss_backward": _nll_backward,
    "index_put": _index_put,
    "index_add": _accumulating(aten.index_add, 2),
    "scatter_add": _accumulating(aten.scatter_add, 2),
    "embedding_dense_backward": _embedding_backward,
    # whose results move by no more than their operands do
    "max": lambda a, out, x: a.error(x).max(),
    "clamp_min": lambda a, out, x, low: a.error(x),
    "where": _moves(torch.where),
    "masked_fill": lambda a, out, x, mask, value: a.error(x).masked_fill(mask, 0.0),
    "fill": _none,
    "zero": _none,
    "zeros_like": _none,
    "ones_like": _none,
    "new_zeros": _none,
    "new_ones": _none,
    "new_empty": _none,
    "new_full": _none,
    "empty_like": _none,
    "copy": lambda a, out, x, y, non_blocking=False: a.error(y),
    "_to_copy": _to_copy,
    "constant_pad_nd": lambda a, out, x, pad, value=0: aten.constant_pad_nd(a.error(x), pad),
    "diff": lambda a, out, x: a.error(x).diff() + a.sums * size(out),
    **{
        name: _moves(getattr(aten, name))
        for name in (
            *("gather", "index_select", "index", "cat", "stack", "embedding", "clone", "flip"),
            *("select_backward", "slice_backward", "expand_copy", "repeat"),
        )
    },
}
# changes of shape that don't call themselves views, and what gives or takes no numbers
EXACT = frozenset(
    (
        *("squeeze_", "unsqueeze_", "t_", "transpose_", "_unsafe_view", "set_", "resize_"),
        *("is_same_size", "equal", "_local_scalar_dense", "record_stream"),
    )
)
