"""Encodes texts as `input_ids` and `labels`, and truncates them."""
