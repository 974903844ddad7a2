"""The system's memory: how much this process may use of it, and whether the system has killed processes for want of it.

Linux limits a process by its control group and by every group around that one (cgroups(7)): a container's is the root
of what it sees, one of systemd or Slurm lies deeper. Each process that is killed for want of memory, the machine's or a
group's, is counted in /proc/vmstat (`count_vm_event(OOM_KILL)` in mm/oom_kill.c).
"""

from __future__ import annotations

import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
COUNTERS = Path("/proc/vmstat")


def machine_memory() -> int | None:
    """Bytes of the machine's memory, or of a control group's around this process that is less; None: not told."""
    try:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    for file in limit_files():
        said = file.read_text().strip() if file.is_file() else ""
        found += [int(said)] if said.isdigit() else []
    return min(found)


def limit_files() -> list[Path]:
    """Where the limits are of the control group that this process is in, and of those around it."""
    told = OWN_GROUP.read_text().splitlines() if OWN_GROUP.is_file() else []
    places = {kinds: place for _, kinds, place in (line.split(":", 2) for line in told)}
    old = next((place for kinds, place in places.items() if "memory" in kinds.split(",")), None)
    root, name = (GROUPS, "memory.max") if old is None else (GROUPS / "memory", "memory.limit_in_bytes")
    own = Path((places.get("", "/") if old is None else old).lstrip("/"))
    return [root / group / name for group in (own, *own.parents)]


def oom_kills() -> int | None:
    """How many processes the system has killed for want of memory since it started; None: it does not count them."""
    try:
        counted = dict(line.split() for line in COUNTERS.read_text().splitlines())
        return int(counted["oom_kill"])
    except (OSError, KeyError):
        return None


def suspicion(before: int | None) -> str:
    """What to say after "was killed by SIGKILL" when `oom_kills` was `before` that: nothing where others sent it."""
    now = oom_kills()
    if before is None or now is None:
        return " (out of memory?)"
    return " (out of memory)" if now > before else ""
