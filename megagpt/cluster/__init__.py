"""Runs on several machines: checks before, the command that starts them, and the verdict after."""
