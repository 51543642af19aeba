"""Scores of queries against candidate rows of a table: see README.md."""

from gr_kernels.candidate_scores.op import Plan, candidate_scores, explain

__all__ = ["Plan", "candidate_scores", "explain"]
