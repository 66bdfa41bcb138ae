"""Prepares data sets before training: split, mixture, packing, cache, preview, serving check."""
