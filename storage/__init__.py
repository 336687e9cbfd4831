"""A run's directory: plan, staging, parts, failures, and the HDF5 layout. Knows nothing of queues or models."""
