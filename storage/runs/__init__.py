"""A run's life in files: its plan, its staging area, its parts, its failures. Knows no queue and no model."""
