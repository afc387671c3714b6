"""From text to batches: tokenizer, sources, shards, order, loader."""
