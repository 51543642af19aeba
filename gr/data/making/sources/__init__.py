"""Sources: ways to make a sequence dataset, one a file, named in ``gr.registry.DATASETS``."""
