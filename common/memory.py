"""The C library's memory allocator, told what kind of process this is. Where it is not glibc, nothing happens.

gRPC makes and frees a buffer for every message. As it comes, glibc gives buffers of some hundred kilobytes back to the
kernel at once and faults them in again for the next message (several times the CPU of the transfer itself), and keeps
a heap of its own for every thread, so that memory grows by what many threads have freed. Never called on import:
only a program's entry point may decide this for its process. Children that it starts are not touched.
"""

import ctypes
import sys

_MIB = 1 << 20
# glibc's <malloc.h>. The first is also the largest value that glibc takes.
_OPTIONS = (
    (-3, 32 * _MIB),  # M_MMAP_THRESHOLD: a buffer below it comes from the heap and stays mapped when it is freed
    (-1, 64 * _MIB),  # M_TRIM_THRESHOLD: so much free memory at the heap's end is kept for the next message
    (-2, 4 * _MIB),  # M_TOP_PAD: the heap grows in steps of this
    (-8, 1),  # M_ARENA_MAX: one heap; buffers cross threads here, and each thread's own heap would keep what it freed
)


def keep_memory_flat() -> bool:
    """Sets the allocator for a process that moves large messages through threads; whether it took."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has one policy and no switches
        return False
    return all([library.mallopt(option, value) == 1 for option, value in _OPTIONS])
