"""Scores of queries against candidate rows of a table: see README.md."""

from gr_kernels.candidate_scores.op import candidate_scores

__all__ = ["candidate_scores"]
