"""A checkpoint on disk: its files, its identity, its dimensions. Loads no weights."""
