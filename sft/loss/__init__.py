"""The loss and its counts: fused linear cross entropy, the vocab-parallel loss, the output head, metrics."""
