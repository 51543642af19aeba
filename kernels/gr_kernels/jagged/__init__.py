"""What a model does to jagged tensors besides attention: see README.md."""

from gr_kernels.jagged.concat_split.op import concat_jagged, split_jagged
from gr_kernels.jagged.dense.op import dense_to_jagged, jagged_to_dense
from gr_kernels.jagged.dropout.op import jagged_dropout
from gr_kernels.jagged.positions_and_times.op import add_positions_and_times

__all__ = [
    "add_positions_and_times",
    "concat_jagged",
    "dense_to_jagged",
    "jagged_dropout",
    "jagged_to_dense",
    "split_jagged",
]
