"""Memory, tokens and time of a run before it starts; the batch size finder."""
