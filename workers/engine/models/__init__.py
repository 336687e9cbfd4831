"""One module for each family of models: what differs from the others in the forward pass."""
