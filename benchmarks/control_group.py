"""A control group of Linux inside our own with a limit of memory, for what is to run out of it; mostly root's alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from pipeline.device.system_memory import limit_files


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A group whose processes may use `limit` bytes together, page cache included: write a process's number into its
    `cgroup.procs`, or start a command by `within`. Raises OSError where none can be made."""
    own = limit_files()[0]
    group = own.parent / f"leanfit-{uuid4().hex[:8]}"
    group.mkdir()
    try:
        (group / own.name).write_text(str(limit))
        yield group
    finally:
        for _ in range(50):  # the last process may still be going
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def within(group: Path, command: list[str]) -> list[str]:
    """The command that enters the group and then becomes `command`."""
    return ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command]
