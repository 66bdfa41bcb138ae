"""Prepares data while training runs: shards, windows, the data loader of a stream."""
