"""Keeps the C library from giving large buffers back to the system after each step on a CPU."""

import ctypes
import platform

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Makes malloc reuse large blocks instead of unmapping them; returns whether it could.

    On a CPU, XLA allocates its activations anew at every step. glibc by default maps each large
    block and unmaps it when freed, so that every step pays one page fault per 4 KiB of activations,
    which is a fifth of a ResNet-50 step. The memory of the process then stays at its peak. Call it
    before the first thread starts, whose memory would otherwise be apart. A no-op without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_M_MMAP_MAX, 0),  # large blocks come from the heap as well
        (_M_TRIM_THRESHOLD, -1),  # the heap never shrinks
        (_M_ARENA_MAX, 1),  # one heap: only the main one can hold large blocks
    )
    return all(mallopt(option, value) == 1 for option, value in settings)
