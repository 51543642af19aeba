"""Action logs -> sequence datasets -> batches: see docs/architecture.md for the way of the data."""
