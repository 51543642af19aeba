"""Small modules that train inside a network which stays as it is, of items or of sequences."""
