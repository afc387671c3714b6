"""The loop, its schedules, checkpoints, metrics and safety."""
