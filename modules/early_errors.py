"""Explain Ctrl-C, and an extension that cannot be loaded, while the modules of a program are imported.

Afterwards `modules.command.command_line` does it. A script imports this first, as the others take a moment.
"""

import os
import signal
import sys
from pathlib import Path
from types import TracebackType

from modules.errors import INTERRUPTED, UserError

ROOT = Path(__file__).resolve().parent.parent


def explain_early_errors() -> None:
    """Print such an error without a traceback and exit with its code, if this process runs a program of ours.

    A program that only imports Reelsmith keeps its `sys.excepthook`.
    """
    program = Path(sys.argv[0])
    if program.suffix == ".py":
        folder = Path(os.path.realpath(program)).parent
        is_ours = ROOT in (folder, folder.parent)
    else:  # a console command of the installed package
        is_ours = program.stem == "reelsmith" or (ROOT / f"{program.stem}.py").is_file()
    if is_ours:
        sys.excepthook = _explain


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next Ctrl-C ends the process at once
        sys.stderr.write("Interrupted.\n")
        raise SystemExit(INTERRUPTED)
    if not isinstance(error, UserError):
        sys.__excepthook__(kind, error, trace)
        return
    from modules.command import command_line  # only after an error

    def fail() -> None:
        raise error

    command_line(fail, needs_packages=False)
