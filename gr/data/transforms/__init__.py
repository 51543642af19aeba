"""Transforms: what becomes of a user's actions between the dataset and a batch (``data.transforms``)."""
