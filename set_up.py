"""Set up this folder for the card that is found, once, and open the page.

Reelsmith.command and Reelsmith.bat start this file with any Python; it needs no packages.

    python set_up.py                    set up what is missing, then open the page
    python set_up.py --build cpu        with another build of torch than the one for the card
    python set_up.py update             take the newest version, if this folder is a clone of git
    python set_up.py update NEW.zip     unpack the version in a zip file into a new folder beside this one

An update overwrites no file of yours: a clone of git with changes or commits of its own is refused.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import modules.interpreter  # noqa: F401
from modules.atomic_write import write_text
from modules.card_builds import BUILDS, BuildInfo, select_build
from modules.command import command_line
from modules.environment import OWN_FOLDER, get_python_path, prepare_environment, read_builds
from modules.errors import InstallationError, OptionError
from modules.installation import ROOT
from modules.parser import Parser
from package.updating import update

# the build of torch that this file installed; without it, .venv is the user's own
NOTE = OWN_FOLDER / "build.txt"
REPLACING = "replacing"  # behind it in that file: another build is there, or half of each
STARTED_IN = "REELSMITH_STARTED_IN"  # variable of the folder in which Reelsmith.command was typed
GB = 1e9


def main() -> None:
    """Set up and open the page, or update."""
    parser = Parser(description=__doc__)
    parser.add_argument("words", nargs="*", metavar="update | NEW.zip", help="instead of the page")
    parser.add_argument("--build", choices=list(BUILDS), help="build of torch; unset: the one for the card")
    args = parser.parse_args()
    if args.words:
        if args.build is not None:
            raise OptionError(
                f"--build: it chooses torch for the start, and {args.words[0]} starts nothing. Type one"
            )
        command, *operands = args.words
        if command == "update" and len(operands) <= 1:
            update(ROOT, typed_path(operands[0]) if operands else None)
        elif command.lower().endswith(".zip") and not operands:  # dropped on Reelsmith.bat
            update(ROOT, typed_path(command))
        else:
            raise OptionError(
                f"{' '.join(args.words)}: unknown. Type update, update NEW.zip, or nothing to start"
            )
    else:
        raise SystemExit(open_page(set_up(args.build)))


def typed_path(word: str) -> Path:
    """Return a path relative to the folder in which the user started, not to this one."""
    return Path(os.environ.get(STARTED_IN, ""), word)


def set_up(build_name: str | None) -> Path:
    """Return the Python of the environment; make and fill it first if that is not done.

    Args:
        build_name: The build of torch that the user chose. None: the build of the environment, or of the GPU.

    Raises:
        OptionError: If a build is chosen for an environment that the user made, which is used unchanged.
        InstallationError: If no build fits, or the disk is too small.
    """
    python = get_python_path(ROOT / ".venv")
    note = _read_note()
    earlier_build = note[0] if note else None
    if python.exists() and earlier_build is None:
        if build_name is not None:
            raise OptionError("--build: .venv is an environment of yours. Rename it, and start again")
        return python
    name, reason = _select_build(build_name, earlier_build)
    is_replacing = earlier_build is not None and (name != earlier_build or REPLACING in note)
    if not python.exists() or name != earlier_build:
        announce(name, reason, BUILDS[name])
        write_text(NOTE, f"{name} {REPLACING}" if is_replacing else name)
    python = prepare_environment(packages=["pip"], build=read_builds()[name], is_replacing=is_replacing)
    if is_replacing:
        write_text(NOTE, name)
    return python


def _select_build(typed_build: str | None, earlier_build: str | None) -> tuple[str, str]:
    """Return the build of torch to use, and why: the typed one, else the earlier one, else for the GPU."""
    if typed_build is not None:
        return typed_build, "as you chose"
    if earlier_build in BUILDS:
        return str(earlier_build), "as before"
    choice = select_build()
    return choice.build, choice.reason


def _read_note() -> list[str]:
    """Return the words of the note in the environment: its build, and whether that is being replaced."""
    # [] if there is no note: the environment does not exist, or the user made it.
    if not NOTE.is_file():
        return []
    return NOTE.read_bytes().decode("utf-8", "replace").split() or ["damaged"]


def announce(name: str, reason: str, facts: BuildInfo) -> None:
    """Say what is downloaded and where to, and wait for a person to agree.

    Raises InstallationError if the disk is too small.
    """
    free = shutil.disk_usage(ROOT).free / GB
    if free < facts.disk_gb:
        raise InstallationError(
            f"the disk of {ROOT} has {free:.1f} GB free, and the build {name} takes about "
            f"{facts.disk_gb} GB. Free some space, or move this folder to another disk"
        )
    say(f"Reelsmith sets up its environment, once: the build {name} of torch ({reason}).")
    say(f"  download  about {facts.download_gb} GB, from PyTorch's index and the index of Python packages")
    say(f"  disk      about {facts.disk_gb} GB in {ROOT}, in .venv and .reelsmith ({free:.0f} GB free)")
    say(f"  instead   --build with one of {', '.join(BUILDS)}")
    if sys.stdin is not None and sys.stdin.isatty():
        say("Press Enter to begin, Ctrl-C to leave. If it breaks off, the next start goes on.")
        sys.stdin.readline()


def open_page(python: Path) -> int:
    """Run the page until it ends, and return its exit code. Ctrl-C is for the page."""
    process = subprocess.Popen([str(python), "reelsmith.py", "browser"], cwd=ROOT)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def say(text: str) -> None:
    """Print a line to standard error."""
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    command_line(main, needs_packages=False)
