"""The decoder, the papers' sizes, and weights to and from `transformers`."""
