"""Position and time embeddings added to the rows of jagged sequences."""
