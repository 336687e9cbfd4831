"""The model: requests in, vectors and answers out. Knows no queue, no run and no file of one."""
