"""Turns prepared sequences into batches: collator, document offsets, sampler, batch arithmetic."""
