"""Jagged tensors to padded ones, and back."""
