"""The images of a run: found by their ids inside the images directory, opened and decoded within bounds. Knows no run."""
