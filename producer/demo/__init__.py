"""The demo: real questions about real images, the whole way."""
