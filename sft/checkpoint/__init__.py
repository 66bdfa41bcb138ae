"""Finding, checking and matching checkpoints; the output folder; the state of a stream."""
