"""A run: its set-up, the loop, occasions, schedules, logs, and how it stops."""
