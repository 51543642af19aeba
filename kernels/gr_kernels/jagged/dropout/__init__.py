"""Dropout whose mask is a pure function of a key, the row and the column."""
