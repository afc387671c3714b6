"""Quality of a model: its validation loss, and the baselines to read it against."""
