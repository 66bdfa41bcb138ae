"""Merges an adapter into its base model and verifies the result."""

from __future__ import annotations

import model_manager
from commands.options import Options


def run(options: Options) -> int:
    """Merges into a new folder."""
    trust = options.trust_remote_code
    model_manager.merge(options.model, options.output_dir, dtype=options.dtype, trust_remote_code=trust)
    return 0
