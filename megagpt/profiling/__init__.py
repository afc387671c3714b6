"""The profile of a few steps: a trace, where the time goes, the memory over time."""
