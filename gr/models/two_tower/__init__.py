"""Pre-ranking: the probability of a label from fields of a user and of an item, by two towers or by one network."""
