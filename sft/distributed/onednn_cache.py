"""Limits how many kernels oneDNN keeps on a CPU: enough for one micro-batch, not for all of a run.

oneDNN compiles a kernel for each shape of a matrix multiplication in half precision. Two caches keep 1,024 of them
each: oneDNN's own, and one in torch's layer above it (ideep). A kernel takes some 0.3 MiB in either and fragments the
heap between the tensors. A micro-batch has 10 to 50 shapes that contain its number of tokens and hardly ever recur,
beside those of attention, which recur all the time (`document_blocks`). A small cache drops the former and keeps the
latter.
"""

from __future__ import annotations

from collections.abc import MutableMapping

# Of 20M parameters on gsm8k (one thread, 16 steps, two rounds each), beside 96 shapes: 32 took 0.99 to 1.00 of the
# processor time and 1.37 to 1.56 GiB where 96 came to 1.6 to 2.1; 16 took 1.03 to 1.05, and 1.31 to 1.50 GiB.
_SHAPES = 32
# Of several names the first that is set counts.
_CACHES = (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"), ("LRU_CACHE_CAPACITY",))


def limit_onednn_cache(environ: MutableMapping[str, str]) -> None:
    """Sets both capacities where the user has not. Read at the first matrix multiplication in half precision."""
    for names in _CACHES:
        if not any(name in environ for name in names):
            environ[names[0]] = str(_SHAPES)
