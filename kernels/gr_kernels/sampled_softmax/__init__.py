"""Sampled softmax with each query's own or with shared negatives: see README.md."""

from gr_kernels.sampled_softmax.op import sampled_softmax

__all__ = ["sampled_softmax"]
