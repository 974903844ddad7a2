"""Receipts from a process of their own that is forked from one which has imported what a receipt needs, and nothing
else: as fresh as one that is started, without the seconds that imports take. Linux and macOS.

As a script it is that process: it reads a line of JSON a receipt, forks, and writes the receipt's line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline import environment
from pipeline.artifact.receipt import Receipt


class Receipts:
    """`check` stands in for `pipeline.artifact.receipt.check`."""

    def __init__(self) -> None:
        self._server = None

    def check(self, directory: Path, offload_to: Path | None = None) -> Receipt:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=environment.child(), text=True,
            )  # fmt: skip
        places = [str(Path(place).resolve()) for place in (directory, offload_to) if place is not None]
        self._server.stdin.write(json.dumps({"places": places, "environment": environment.child()}) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return (
            Receipt(**answer) if answer else Receipt(False, None, [f"{directory}: the process that opened it failed"])
        )

    def close(self) -> None:
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(60)
            self._server.stdout.close()


def serve() -> None:
    """Imports, then a fork for each line."""
    environment.prepare()
    import transformers
    from transformers import modeling_utils  # noqa: F401  most of the seconds

    from pipeline.artifact import receipt, store  # noqa: F401

    for auto in receipt.AUTO_CLASSES.values():
        getattr(transformers, auto)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ.clear()
            os.environ.update(asked["environment"])
            try:
                receipt.main(asked["places"])
                sys.stdout.flush()
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        _, status = os.waitpid(child, 0)
        if status != 0:
            print("null", flush=True)
    os._exit(0)  # without the seconds that it takes to take everything down


if __name__ == "__main__":
    serve()
