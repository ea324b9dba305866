"""Shards -> augmented batches on the device: plan, reader processes, DALI graph, loader."""
