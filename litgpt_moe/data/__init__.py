"""Text on disk -> stories -> token shards -> batches, and the same as a Weights & Biases artifact."""
