"""Models by their names; runs to and from the format of `transformers`."""
