"""Log-partition function and cross-entropy over a whole catalogue: see README.md."""

from gr_kernels.log_partition.op import cross_entropy, log_partition

__all__ = ["cross_entropy", "log_partition"]
