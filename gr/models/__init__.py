"""Sequence encoders, tasks, similarities and objectives, and the recommender that joins them."""
