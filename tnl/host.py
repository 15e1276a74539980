"""What this process holds of the host's memory, and what there is for it; a container's limit counts."""

import re
from pathlib import Path

import psutil

CONTAINER = Path("/sys/fs/cgroup")
"""Where Linux says how much memory a container may use."""
STATUS = Path("/proc/self/status")


def available() -> int:
    """Bytes that this process may still take without anything being pushed out to disk."""
    free = psutil.virtual_memory().available
    limit, used = CONTAINER / "memory.max", CONTAINER / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
        files = CONTAINER / "memory.stat"  # cached files count as used, and give way
        cached = re.findall(r"^(?:in)?active_file (\d+)$", files.read_text(encoding="utf-8"), re.M) if files.is_file() else []
        free = min(free, int(text) - int(used.read_text(encoding="utf-8")) + sum(map(int, cached)))
    return max(free, 0)


def resident() -> int:
    """Bytes that this process holds in memory now."""
    return psutil.Process().memory_info().rss


def peak_resident() -> int:
    """The most bytes that this process has held in memory so far."""
    if STATUS.is_file():
        # not getrusage: it begins with what the process held that started this one
        line = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.M)
        if line:
            return max(int(line.group(1)) * 1024, resident())
    if hasattr(found := psutil.Process().memory_info(), "peak_wset"):
        return int(found.peak_wset)
    # macOS: bytes; Windows has no such module
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
