"""The decoder, the papers' sizes, and the exchange with `transformers`."""
