"""The sweeps: which runs there are, what is packed, fed and reported."""
