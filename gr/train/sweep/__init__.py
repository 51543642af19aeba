"""Sweeps: a family of models trained at several computes, and the law that they follow."""
