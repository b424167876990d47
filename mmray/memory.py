"""How this process holds its memory."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys

#: Of mallopt(3): the options' numbers.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30

#: Environment of a process that computes. One heap for all threads: those that glibc makes for one
#: end at 64 MiB, and what needs another is new pages each time all the same. In large pages, where
#: the kernel gives them: a network walks through its weights in every batch, 512 times as many
#: addresses to look up in small ones. https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html
HEAP = {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep what this process frees, up to a GiB, rather than return it.

    A layer's output of some megabytes is otherwise new pages from the kernel in every batch, which
    costs a small network on a CPU as much time as its arithmetic. Without glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


@functools.cache
def settle() -> None:
    """Take what this process holds now for what it holds to its end: no collection of garbage walks
    through all its modules again, nor the last one, half a second of a core when it ends."""
    gc.collect()
    gc.freeze()
