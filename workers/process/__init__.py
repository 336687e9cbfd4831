"""Processes and GPUs: children that end with their parent, one worker for each GPU."""
