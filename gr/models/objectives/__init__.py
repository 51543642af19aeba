"""Objectives: losses with their negatives, summed over the targets of a batch."""
