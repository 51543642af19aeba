"""Engines: how gradients become steps, over processes."""
