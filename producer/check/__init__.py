"""The pre-flight check: what a run with the same options would meet, and about what it would cost."""
