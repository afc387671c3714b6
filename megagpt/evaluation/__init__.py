"""What a model is worth: validation loss and the baselines to read it against."""
