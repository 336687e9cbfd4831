"""What is asked of a checkpoint before it serves: that it can be, and that the engine computes what transformers does."""
