"""A CPU's memory: XLA's buffers keep their pages from step to step."""

import ctypes
import pathlib

# Of glibc's mallopt(3), by their numbers in malloc.h.
TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -2, -3, -8
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
RESERVED = (2 << 30) - 4096  # of addresses, not of memory; an int holds no more
BLOCK = 16 << 20  # of bytes
HUGE = 14  # MADV_HUGEPAGE of madvise(2)


def keep() -> None:
    """Lets this process keep what it frees, in pages of 2 MiB, for its next buffers.

    XLA takes the buffers of each step from malloc. glibc gives them back to the system, and each
    of their 4 KiB costs a page fault at the next step: a fifth to a third of a small model's
    training. Here all threads share one heap, which keeps up to 2 GiB that are free. The process's
    peak of memory stays; what it frees is not there for others. Without glibc nothing is changed.

    Call it before there are JAX's devices: threads that have a heap of their own keep it.
    """
    libc = ctypes.CDLL(None)
    maps = pathlib.Path("/proc/self/maps")
    if not hasattr(libc, "mallopt") or not maps.exists():
        return
    libc.mallopt(ARENA_MAX, 1)
    libc.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    libc.mallopt(TOP_PAD, RESERVED)
    # Grows the heap by the pad, so that its pages can be named. Holes in it are filled first.
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks: list[int] = []
    top = libc.sbrk(0)
    while libc.sbrk(0) == top and len(blocks) < RESERVED // BLOCK:
        blocks.append(libc.malloc(ctypes.c_size_t(BLOCK)))
    for block in blocks:
        libc.free(block)
    for line in maps.read_text().splitlines():
        if line.endswith("[heap]"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            # A kernel that has no such pages refuses, and its own serve.
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), HUGE)


def release() -> None:
    """Gives what is free back to the system, so that its memory can be counted anew."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
        keep()  # the heap has lost its room
