"""The same preparation while training runs: shards, windows, the dataloader of a stream."""
