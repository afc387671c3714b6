"""From text to batches: tokenizer, sources, shards, sampler, loader."""
