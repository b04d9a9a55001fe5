"""Names of temporary files, which tell who writes them: `.NAME.MARK.tmp`.

A mark has the machine, the process and a random number, in hexadecimal. So the leftover of a killed process
is known at once on its own machine, and a file that another process is writing is never taken for one. On
other machines that share the folder only the age of a file can be asked. Nothing is locked: locks of network
folders do not hold everywhere.
"""

import functools
import math
import os
import platform
import re
import secrets
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

LEFTOVER_SECONDS = 3600.0  # older temporary files are leftovers: no writer leaves its file alone for so long
# the mark of earlier versions had eight random digits, which tell nothing of the writer
_MARK = r"[0-9a-f]{8}|(?P<machine>[0-9a-f]{8})(?P<process>[0-9a-f]{6})[0-9a-f]{4}"
_TEMPORARY = re.compile(rf"\.(?P<name>.+)\.(?:{_MARK})\.tmp")
_PROC = Path("/proc")


@dataclass(frozen=True)
class Temporary:
    """What the name of a temporary file tells."""

    name: str  # of the file that it becomes
    is_written: bool | None  # whether its writer lives; None: unknown, it may be on another machine

    def least_age(self, older_seconds: float) -> float:
        """Return how many seconds a leftover must have been unchanged. older_seconds: if nothing is known."""
        if self.is_written is None:
            return older_seconds
        # the number of a process may have been given to another one since, so age counts for living ones too;
        # that of a dead one never counts, whatever the clock of the folder's machine says
        return LEFTOVER_SECONDS if self.is_written else -math.inf


def temporary_name(path: Path) -> Path:
    """Return a new temporary path in the folder of `path`."""
    mark = f"{_machine():08x}{os.getpid() & 0xFFFFFF:06x}{secrets.token_hex(2)}"
    return path.with_name(f".{path.name}.{mark}.tmp")


def parse_temporary(name: str) -> Temporary | None:
    """Return what a file name tells if it is that of a temporary file; else None."""
    found = _TEMPORARY.fullmatch(name)
    if found is None:
        return None
    is_ours = found["machine"] is not None and int(found["machine"], 16) == _machine()
    return Temporary(found["name"], _is_alive(int(found["process"], 16)) if is_ours else None)


@functools.cache
def _machine() -> int:
    """Return a number of this machine since it was started, and of this container: of what numbers its
    processes.
    """
    words = [platform.node()]
    try:
        words.append((_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii"))
        words.append(str((_PROC / "self/ns/pid").stat().st_ino))
    except OSError:
        words.append(str(uuid.getnode()))
    return zlib.crc32("\n".join(words).encode())


def _is_alive(process: int) -> bool | None:
    if os.name == "nt":  # asking by a signal would end the process there
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True
