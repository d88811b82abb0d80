"""The most memory this process has had."""

import re
import resource
import sys
from pathlib import Path

# ``ru_maxrss`` is in kibibytes on Linux and in bytes on macOS (getrusage(2) of both).
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux hands ``ru_maxrss`` down from the process that started this one, however large it was (getrusage(2), proc(5));
    ``VmHWM`` is this program's own.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        high_water = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if high_water:
            return int(high_water[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
