"""What a run shows and leaves for people: console, progress, metrics file, run files, model card, trackers."""
