"""How many kernels the libraries under torch keep on a CPU: enough for a pass, not for all the passes of a run.

A product in half precision gets code for its very shape. Two caches keep it, for 1,024 shapes each: oneDNN's, and one
in torch's layer above it (ideep). A shape costs some 0.3 MiB in either, and leaves holes in the heap between the
tensors. A pass has 10 to 50 shapes that hold its number of tokens, which hardly ever comes again, beside those of
attention, which come again all the time (`document_blocks`). With few places the one kind goes and the other stays.
"""

from __future__ import annotations

from collections.abc import MutableMapping

# Of 20M parameters on gsm8k (one thread, 16 steps, two rounds each), beside 96 shapes: 32 took 0.99 to 1.00 of the
# processor time and 1.37 to 1.56 GiB where 96 came to 1.6 to 2.1; 16 took 1.03 to 1.05, and 1.31 to 1.50 GiB.
_SHAPES = 32
# The first name that is set counts.
_CACHES = (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"), ("LRU_CACHE_CAPACITY",))


def limit_onednn_cache(environ: MutableMapping[str, str]) -> None:
    """Sets both capacities where the user has not; read by the libraries at their first product in half precision."""
    for names in _CACHES:
        if not any(name in environ for name in names):
            environ[names[0]] = str(_SHAPES)
