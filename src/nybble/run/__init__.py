"""The run folder: its files, its results, and what --resume requires."""
