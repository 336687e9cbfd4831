"""The Celery app, its tasks, dynamic batching, the model engine and the collector."""
