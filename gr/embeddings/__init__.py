"""Embedding tables behind one interface: lookup, scores, topk, cross_entropy."""
