"""Rebuilding published tables: the table, the runs behind it, paired comparisons of runs."""
