"""The forms that a table comes in: a reader for each, and the one that a path names. After them nothing knows the form."""
