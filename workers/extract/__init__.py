"""One question in a task's thread: its image and prompt prepared, a batch joined, its result staged."""
