"""What a sequence of allocations and frees makes a process hold on the CPU: found out by making it.

torch takes CPU memory from malloc, and glibc's gives little of it back. Blocks below a size that it raises by itself to
32 MiB lie in a heap that shrinks only at its end; an aligned request (`posix_memalign`) asks for some bytes more than
it uses, so that it does not fit the hole that a block of its own size has left; and what is small settles in the holes:
the records of tensors, and the nodes of autograd's graph, which live until the backward pass has ended. In the
first forward pass of a LoRA on a model of 100M parameters 530 MiB came into use and the heap grew by 1,020. A sum tells
550 at the peak of a step, this 850 to 910. The small ones matter: replayed as it was recorded, the training of a model
of 20M grew the heap by 335 MiB (315 in training itself), and by 220 without what is smaller than 64 bytes.

So a child process makes the same requests to the same malloc in the same order, and touches none of the memory: the
system gives no page for it but those where malloc writes down a block's size.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from array import array
from collections.abc import Hashable, Iterable

from sft.estimate.memory_trace import Event

_ALIGNMENT = 64  # bytes, of torch's CPU storages (gAlignment in c10)
# Bytes that torch 2.13 asks for beside a storage and for a node of the graph, as seen under a traced malloc.
_STORAGE = 96  # before the storage's own block
_TENSOR = (176, 24)  # behind it
_NODE = (488, 16, 24)
# Bytes of a request after which it is asked what is held; smaller ones are seen with the next of these.
_LOOKS_FROM = 2**16
# Bytes before everything else: where the heap begins decides what fits where. With these the first steps of a model of
# 34M with checkpointing were told 507 to 843 MiB (the real ones took 690 to 830), of one without 1,038 to 1,136. What
# one in four of them exceeds is told: neither chance nor the best case.
_SHIFTS = range(24, 96_000, 8_000)

# Reads pairs of int64: a block's number and its size as in `allocation_trace.Event`; prints bytes, and how many pairs
# came.
_REPLAY = f"""
import ctypes, sys
from array import array

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo
malloc, align, free = libc.malloc, libc.posix_memalign, libc.free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
align.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
pointer = ctypes.c_void_p()
where = ctypes.addressof(pointer)

def held():
    info = libc.mallinfo2()
    return info.arena + info.hblkhd

malloc(int(sys.argv[1]))  # shifts where all others lie
events = array("q", sys.stdin.buffer.read())
numbers, sizes = events[::2], events[1::2]
blocks = [()] * (max(numbers, default=0) + 1)  # made at once: Python takes nothing from malloc in between
before = most = held()
for block, size in zip(numbers, sizes):
    if size > 0:
        storage = malloc({_STORAGE})
        if align(where, {_ALIGNMENT}, size):
            sys.exit(1)
        blocks[block] = (pointer.value, storage, *map(malloc, {_TENSOR}))
        if size >= {_LOOKS_FROM}:
            most = max(most, held())
    elif size < 0:
        blocks[block] = tuple(map(malloc, {_NODE}))
    else:
        for address in blocks[block]:
            free(address)
print(max(most, held()) - before, len(numbers))
"""


def held_at_most(events: Iterable[Event]) -> int | None:
    """The most bytes that a process holds for these allocations and frees, with what malloc keeps of the freed ones.

    Returns:
        None where that cannot be found out: the C library is not glibc 2.33 or later, or does not give that much.
    """
    if platform.libc_ver()[0] != "glibc":
        return None
    numbers: dict[Hashable, int] = {}
    requests = array("q")
    for block, size in events:
        requests.extend((numbers.setdefault(block, len(numbers)), size))
    told = []
    for shift in _SHIFTS:
        held = _replay(requests, shift)
        if held is None:
            return None
        told.append(held)
    return sorted(told)[-len(told) // 4]


def _replay(requests: array[int], shift: int) -> int | None:
    child = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _REPLAY, str(shift)],
        input=requests.tobytes(),  # of anything but bytes, subprocess in Python 3.11 sends a part: it counts in items
        capture_output=True,
        env={},
    )
    held, replayed = map(int, child.stdout.split()) if child.returncode == 0 else (0, 0)
    return held if replayed == len(requests) // 2 else None
