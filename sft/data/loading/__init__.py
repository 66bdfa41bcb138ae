"""From prepared rows to batches: collator, document offsets, sampler, batch arithmetic."""
