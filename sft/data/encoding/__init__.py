"""Text becomes `input_ids` and `labels`; truncation."""
