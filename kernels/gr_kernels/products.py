"""Matrix products whose precision doesn't depend on the processor: float32 results of 16-bit factors, sums in blocks.

Shapes: C rows, N terms of each sum, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.tracing import device_type

NARROW = (torch.float16, torch.bfloat16)
# Terms that one call of a CPU's BLAS adds up. Its routines for few rows or few columns, matrix times vector above all,
# may add the terms one after the other, and 20,011 of them lose 30 times as much as in a larger product. Longer sums
# are made of blocks, each a product of its own: at most 2,048 terms and then N / 2,048 sums, whoever adds. With 64 rows
# and 64 columns that takes 2 % longer than one call.
BLOCK = 2048


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, two matrices or two batches of any shape, in float32 at least: scores aren't rounded to 16 bits.

    On CUDA 16-bit factors stay what they are (the tensor cores add in float32); elsewhere PyTorch rounds the result
    to the factors' dtype, so they are widened first.
    """
    if a.dtype not in NARROW:
        return a @ b
    if a.device.type != "cuda":
        return a.float() @ b.float()
    if a.dim() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    flat = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return flat.unflatten(0, a.shape[:-2])


def sum_of_rows(weights_CN: Tensor, rows_ND: Tensor, scale: float, out_CD: Tensor) -> None:
    """out = scale * weights @ rows, for sums so long that their order matters (N the size of a catalogue)."""
    count = rows_ND.shape[0]
    step = BLOCK if device_type(rows_ND.device) == "cpu" else max(1, count)
    torch.addmm(out_CD, weights_CN[:, :step], rows_ND[:step], beta=0, alpha=scale, out=out_CD)
    for start in range(step, count, step):
        block = slice(start, start + step)
        out_CD += (weights_CN[:, block] @ rows_ND[block]).mul_(scale)
