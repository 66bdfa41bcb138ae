"""Attention within documents of a packed row: the kernel, its selection, the check that nothing leaks."""
