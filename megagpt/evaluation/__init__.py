"""Quality of a model: its validation loss, and a baseline to compare it with."""
