"""The gradient of a table whose entries were added to scores: see README.md."""

from gr_kernels.bias_table_gradient.op import bias_table_gradient

__all__ = ["bias_table_gradient"]
