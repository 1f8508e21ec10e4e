"""Shards -> batches -> predictions -> losses -> checkpoints."""
