"""Checkpoints: finding and checking them, whether a run may resume from one; the output folder; a stream's state."""
