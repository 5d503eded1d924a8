"""Main memory that this process may still take: what is free, or what limits of the system leave of it."""

from contextlib import suppress
from pathlib import Path

import psutil

# Of a control group, version 2 and 1: its folder under the root, its limit, what it takes, and pages of files in that,
# which the system takes back when memory is short.
FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes() -> int:
    """Bytes that this process may still take: free ones, within `ulimit` and the limits of a container or a queue.

    Example:
        >>> free_bytes() <= psutil.virtual_memory().total
        True
    """
    left = [psutil.virtual_memory().available, *left_in_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))]
    if hasattr(psutil, "RLIMIT_DATA"):  # on Linux
        process = psutil.Process()
        taken = process.memory_info()
        for limit, used in ((psutil.RLIMIT_AS, taken.vms), (psutil.RLIMIT_DATA, taken.data)):
            most, _ = process.rlimit(limit)
            if most != psutil.RLIM_INFINITY:
                left.append(max(0, most - used))
    return min(left)


def left_in_groups(root: Path, own: Path) -> list[int]:
    """Bytes that the control groups of this process leave, its own and those around it; none where there is no limit.

    Args:
        root: Where the groups are mounted.
        own: The file that names those of this process.
    """
    found = []
    lines = own.read_text().splitlines() if own.is_file() else []
    for _, kinds, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        for folder, limit, used, cached in FILES:
            if folder not in kinds.split(","):
                continue
            base = root / folder
            group = base / path.lstrip("/")
            for each in (group, *(parent for parent in group.parents if parent.is_relative_to(base))):
                with suppress(OSError, ValueError):  # the root has no such files; "max" is no limit
                    most, taken = (int((each / name).read_text()) for name in (limit, used))
                    stat = dict(line.split() for line in (each / "memory.stat").read_text().splitlines())
                    found.append(max(0, most - taken + int(stat.get(cached, 0))))
    return found
