"""Optimizer factory, master weights, gradient norm, learning rate schedules, resuming their settings."""
