"""Buffers that are freed keep their pages. In processes of its own: this one keeps them already."""

import json
import pathlib
import subprocess
import sys

SCRIPT = """
import ctypes, json, resource, sys, threading
from lit_jax.runtime import pages

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def write(size):
    "A new buffer."
    buffer = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    libc.memset(buffer, 1, ctypes.c_size_t(size))
    return buffer

def fill(size):
    "Writes into a buffer, and frees it."
    libc.free(write(size))

def work(found):
    "Page faults of two buffers, after two others. A thread's own heap cannot hold the second."
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        fill(16 << 20)
        fill(96 << 20)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

def resident():
    "MB of this process's memory."
    status = open("/proc/self/status").read().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS:")).split()[1]) / 1e3

if sys.argv[1] != "nothing":
    pages.keep()
if sys.argv[1] == "release":
    # Small ones between large ones stay, so that the heap has holes.
    large = [(write(25_000_000), write(300_000))[0] for _ in range(16)]
    held = resident()
    for buffer in large:
        libc.free(buffer)
    pages.release()
    found = [held - resident()]
else:
    found = []
maps = open("/proc/self/smaps").read().splitlines()
heap = [i for i, line in enumerate(maps) if line.endswith("[heap]")]
ends = [maps[i].split()[0].split("-") for i in heap]
flags = [next(line for line in maps[i:] if line.startswith("VmFlags")) for i in heap]
found.append(sum(int(end, 16) - int(start, 16) for start, end in ends))
found.append(all(" hg" in each for each in flags))
thread = threading.Thread(target=work, args=(found,))
thread.start()
thread.join()
print(json.dumps(found))
"""


def run(asked):
    command = [sys.executable, "-c", SCRIPT, asked]
    found = subprocess.run(command, capture_output=True, check=True)
    return json.loads(found.stdout)


def test_a_buffer_that_is_freed_serves_again_without_page_faults():
    *_, faults = run("nothing")
    heap, is_huge, kept = run("keep")
    # 28,672 pages of 4 KiB, or 56 of 2 MiB where the system has them by itself.
    assert faults > 50 and kept < faults / 10
    assert heap > 2_000_000_000
    assert is_huge == pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists()


def test_what_is_released_is_the_systems_and_later_buffers_are_kept_again():
    released, heap, is_huge, kept = run("release")
    assert released > 300  # of 400; a page of 2 MiB that is cut may stay whole
    assert heap > 2_000_000_000 and kept < 5
    assert is_huge == pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists()
