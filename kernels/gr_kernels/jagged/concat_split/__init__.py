"""Jagged tensors put together sequence by sequence, and taken apart again."""
