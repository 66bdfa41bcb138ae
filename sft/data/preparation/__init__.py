"""Data sets prepared before training: split, mixture, packing, cache, preview, the serving check."""
