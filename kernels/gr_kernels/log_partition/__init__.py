"""Log-partition function and cross-entropy over a whole catalogue: see README.md."""

from gr_kernels.log_partition.op import Plan, cross_entropy, explain, log_partition

__all__ = ["Plan", "cross_entropy", "explain", "log_partition"]
