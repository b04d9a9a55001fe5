"""Run a script where there is little room, as a process of its own:

    python run_limited.py file BYTES SCRIPT ARGUMENTS...                no file may be larger
    python run_limited.py disk BYTES FOLDER AFTER SCRIPT ARGUMENTS...   FOLDER is on a disk of that size

The disk ends with the process. It begins with what lies in FOLDER; what lies there at the end is copied to
AFTER.
"""

import atexit
import ctypes
import os
import runpy
import shutil
import sys
from pathlib import Path

NO_MOUNT = 99  # exit code where the system lets no ordinary user mount a file system
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # of Linux's unshare


def mount_small_disk(size: int, folder: Path) -> bool:
    """Put an empty file system of so many bytes on a folder, for this process alone; return whether that
    was possible.
    """
    system, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    if not hasattr(system, "unshare") or system.unshare(NEW_MOUNTS | NEW_USER):
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text, encoding="ascii")
    return not system.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())


def main() -> None:
    kind, size, *words = sys.argv[1:]
    if kind == "disk":
        folder, after, *words = words
        shutil.copytree(folder, after)
        if not mount_small_disk(int(size), Path(folder)):
            raise SystemExit(NO_MOUNT)
        shutil.copytree(after, folder, dirs_exist_ok=True)
        shutil.rmtree(after)
        # first registered, last done: the script has cleaned up
        atexit.register(shutil.copytree, folder, after)
    else:
        import resource  # of POSIX systems

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
