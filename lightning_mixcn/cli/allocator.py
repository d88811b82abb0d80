"""Settings of the allocators: the C library's for training on a CPU, torch's for a GPU."""

import ctypes
import mmap
import os
import sys

# The second is the older name.
_GPU_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# glibc's <malloc.h> and <sys/mman.h>.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_DEFAULT_TOP_PAD = 128 * 1024
_MADV_HUGEPAGE = 14
# The most that glibc takes on 64 bits (half of HEAP_MAX_SIZE); larger blocks go back to the system each time.
_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024
_NEVER_TRIM = 2**31 - 1
# Address space, not memory: a page is taken when it is first written to.
_RESERVED_FOR_HUGE_PAGES = 2**31 - 2**26


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of returning it to the system and fetching zeroed pages again.

    Activations of one step have the sizes of the next one's; in training on two cores this was worth about 9 %. The
    first 2 GiB are huge pages (2 MiB instead of 4 KiB) where the kernel gives them on request, worth another 4 %.
    Settings in the environment (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``) are left alone.

    Returns:
        Whether it was done: only with glibc, on Linux.
    """
    if not sys.platform.startswith("linux") or not _is_glibc():
        return False
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    libc = ctypes.CDLL(None)
    done = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
    _ask_for_huge_pages(libc)
    return all(done)


def grow_gpu_segments() -> None:
    """Have torch's GPU allocator grow its segments, unless the environment says otherwise; before torch is imported.

    Each expert of each layer has another number of rows in every step, and blocks of so many sizes leave holes in
    segments of a fixed size.
    """
    if not any(name in os.environ for name in _GPU_ALLOCATOR) and sys.platform.startswith("linux"):
        os.environ[_GPU_ALLOCATOR[0]] = "expandable_segments:True"


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Grow the heap once, by a lot, and advise the kernel; where it declines, nothing is lost."""
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes = (ctypes.c_size_t,), (ctypes.c_ssize_t,)
    libc.free.argtypes, libc.madvise.argtypes = (ctypes.c_void_p,), (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mallopt(_M_TOP_PAD, _RESERVED_FOR_HUGE_PAGES)
    block = libc.malloc(_LARGEST_MMAP_THRESHOLD - 4096)  # more than what the heap has left, so the heap grows
    libc.mallopt(_M_TOP_PAD, _DEFAULT_TOP_PAD)
    if block is None:
        return
    start, end = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE, libc.sbrk(0)
    if start < end:  # else the block is not from the heap
        libc.madvise(start, end - start, _MADV_HUGEPAGE)
    libc.free(block)


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):  # another C library does not know the name
        return False
