"""The collaborators of a training step and what surrounds it: evaluation, callbacks, NEFTune, MFU."""
