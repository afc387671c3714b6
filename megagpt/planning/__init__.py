"""A run's steps and memory, computed before it starts."""
