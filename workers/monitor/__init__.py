"""What people and programs see of a worker: presence, health, metrics, troubles."""
