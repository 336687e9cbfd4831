"""A whole run on this machine: an embedded server, workers and a collector, supervised."""
