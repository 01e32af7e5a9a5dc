"""How many CPUs this process may use: its affinity, and the CPU time that its control groups grant it.

A container is usually held to some CPUs' worth of time on a machine with many more CPUs. Threads beyond that quota do
not run sooner; they use it up, and then all of them wait. The formats are those of cgroups(7), proc_pid_mountinfo(5),
the kernel's admin-guide/cgroup-v2 (``cpu.max``) and scheduler/sched-bwc (``cpu.cfs_quota_us``).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator

__all__ = ["affinity", "available", "quota"]


def affinity() -> int:
    """Return how many CPUs the scheduler may put this process on, at least 1.

    That is the main thread's affinity, for any other thread may have been tied to a CPU of its own.
    """
    if hasattr(os, "sched_getaffinity"):
        try:
            return len(os.sched_getaffinity(os.getpid()))
        except OSError:  # the main thread has gone
            return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota(root: str = "/") -> float | None:
    """Return how many CPUs' worth of time the control groups grant this process, None without a limit.

    The smallest limit of the process's own group and all groups above it counts, in the unified hierarchy (version 2)
    and in the old one of the cpu controller (version 1). What cannot be read or understood limits nothing.

    Parameters
    ----------
    root : str
        The folder that holds ``proc`` and what the paths in ``/proc/self/mountinfo`` name.
    """
    limits = [
        limit
        for version, folder in _folders(root)
        if (limit := _unified_limit(folder) if version == 2 else _cfs_limit(folder)) is not None
    ]
    return min(limits, default=None)


def available(root: str = "/") -> int:
    """Return how many threads can run at the same time: the affinity or the quota rounded down, at least 1."""
    limit = quota(root)
    return affinity() if limit is None else max(1, min(affinity(), math.floor(limit)))


def _folders(root: str) -> Iterator[tuple[int, str]]:
    """Yield each hierarchy's version and the folders of this process's group and of the groups above it."""
    own = dict(_own_groups(root))
    for version, top, mount_point in _mounts(root):
        group = own.get(version)
        if group is None:
            continue
        # A mount may show only a part of the hierarchy. A group outside it cannot be seen; the top may be above it.
        below = group[len(top) :] if f"{group}/".startswith(f"{top}/") else ""
        names = [name for name in below.split("/") if name]
        if ".." in names:
            names = []
        for depth in range(len(names), -1, -1):
            yield version, os.path.join(root, mount_point.lstrip("/"), *names[:depth])


def _own_groups(root: str) -> Iterator[tuple[int, str]]:
    """Yield (version, path of the process's group in the hierarchy); the root group is ""."""
    for line in _lines(os.path.join(root, "proc/self/cgroup")):
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and (not controllers or "cpu" in controllers.split(",")):
            yield 1 if controllers else 2, path.rstrip("/")


def _mounts(root: str) -> Iterator[tuple[int, str, str]]:
    """Yield (version, what part of the hierarchy is mounted, where) for mounts that can hold limits of CPU time."""
    for line in _lines(os.path.join(root, "proc/self/mountinfo")):
        mount, _, kind = line.partition(" - ")
        fields, described = mount.split(" "), kind.split(" ")
        if len(fields) < 5 or len(described) < 3:
            continue
        top, mount_point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), f) for f in fields[3:5])
        if described[0] == "cgroup2":
            yield 2, top.rstrip("/"), mount_point
        elif described[0] == "cgroup" and "cpu" in described[2].split(","):
            yield 1, top.rstrip("/"), mount_point


def _unified_limit(folder: str) -> float | None:
    """Read ``cpu.max``: quota and period in microseconds, or ``max``."""
    words = " ".join(_lines(os.path.join(folder, "cpu.max"))).split()
    return _ratio(words[0], words[1] if len(words) > 1 else "100000") if words else None


def _cfs_limit(folder: str) -> float | None:
    """Read ``cpu.cfs_quota_us``, -1 without a limit, and ``cpu.cfs_period_us``."""
    quota_us, period_us = (
        "".join(_lines(os.path.join(folder, name))).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    )
    return _ratio(quota_us, period_us)


def _ratio(quota_us: str, period_us: str) -> float | None:
    if not all(re.fullmatch("[0-9]{1,18}", text) and int(text) for text in (quota_us, period_us)):
        return None  # "max", "-1", or no limit that anybody could have set
    return int(quota_us) / int(period_us)


def _lines(path: str) -> list[str]:
    """Return a file's lines, none when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(1 << 20).splitlines()
    except (OSError, ValueError):  # ValueError: a path that no file can have
        return []
