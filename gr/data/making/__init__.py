"""Action log -> sequence dataset: reading, checking, converting, numbering, partitions, sources."""
