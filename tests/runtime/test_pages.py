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

def fill(size):
    "Writes into a buffer, and frees it."
    buffer = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    libc.memset(buffer, 1, ctypes.c_size_t(size))
    libc.free(buffer)

def work(found):
    "Page faults of two buffers, after two others. A thread's own heap cannot hold the second."
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        fill(16 << 20)
        fill(96 << 20)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "keep":
    pages.keep()
maps = open("/proc/self/smaps").read().splitlines()
heap = next(i for i, line in enumerate(maps) if line.endswith("[heap]"))
start, end = maps[heap].split()[0].split("-")
flags = next(line for line in maps[heap:] if line.startswith("VmFlags"))
found = [int(end, 16) - int(start, 16), " hg" in flags]
thread = threading.Thread(target=work, args=(found,))
thread.start()
thread.join()
print(json.dumps(found))
"""


def test_a_buffer_that_is_freed_serves_again_without_page_faults():
    def run(asked):
        command = [sys.executable, "-c", SCRIPT, asked]
        found = subprocess.run(command, capture_output=True, check=True)
        return json.loads(found.stdout)

    *_, faults = run("nothing")
    heap, is_huge, kept = run("keep")
    # 28,672 pages of 4 KiB, or 56 of 2 MiB where the system has them by itself.
    assert faults > 50 and kept < faults / 10
    assert heap > 2_000_000_000
    assert is_huge == pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists()
