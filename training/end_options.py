"""--on_end: a command that is started when a run is over. Standard library only."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from modules.errors import OptionError
from modules.options import SECRET, STARTS, Options, option

ON_END = "on_end"
HELP = (
    "start this command once the run has finished, stopped or failed; REELSMITH_STATE and other variables "
    "say what happened; it has to be typed, as no file may start a program"
)
# programs whose first word is a script
INTERPRETERS = ("python", "bash", "sh", "zsh", "perl", "ruby", "node")
SHELLS = ("bash", "sh", "zsh", "fish", "cmd", "powershell", "pwsh")
# words that only a shell understands, and the beginning of variables as it writes them
OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>", "2>&1", "&>"}
VARIABLES = ("$REELSMITH_", "${REELSMITH_", "%REELSMITH_")
_AS_SHELL = "Put the line into a script, or give it to a shell: --on_end \"bash -c '...'\""


class EndOptions(Options, title="at the end"):
    """What is started when a training is over."""

    on_end: str | None = option(HELP, metavar="COMMAND", facts={**STARTS, **SECRET})

    def __post_init__(self) -> None:
        if self.on_end is not None:
            read_command(self.on_end)

    @property
    def words(self) -> list[str]:
        """Return the words of the command; none without --on_end."""
        return [] if self.on_end is None else read_command(self.on_end)


def read_command(text: str) -> list[str]:
    """Return the words of a command, split as this system's command line is.

    Raises OptionError if no program of this name can be started from the current folder, if its script is not
    there, or if the command needs a shell.
    """
    words = _split(text)
    if not words or not words[0]:
        raise OptionError(f'--{ON_END} is empty: give a command, such as --{ON_END} "python notify.py"')
    import shutil  # not for --help: it loads what packs files

    program = words[0]
    name = Path(program).name.lower().removesuffix(".exe")
    if name not in SHELLS:
        _refuse_shell(words)
    if shutil.which(program) is None:
        raise OptionError(f"--{ON_END}: {program} {_explain_missing(program)}")
    script = words[1] if len(words) > 1 else "-"
    runs_script = name.rstrip("0123456789.") in INTERPRETERS and not script.startswith("-")
    if runs_script and not Path(script).is_file():
        raise OptionError(f"--{ON_END}: there is no script {script} in {Path.cwd()}. Correct the path")
    return words


def _split(text: str) -> list[str]:
    """Split a command line into words: as a shell does, on Windows as programs there do."""
    if os.name == "nt":
        return _split_for_windows(text)
    try:
        return shlex.split(text)
    except ValueError as error:
        raise OptionError(
            f"--{ON_END} {text}: {str(error).lower()}. Close the quotes, or leave them out"
        ) from None


def _split_for_windows(text: str) -> list[str]:
    """Split a command line as programs of Windows do, with the system's own function."""
    import ctypes  # only there

    if not text.strip():
        return []  # for which the function returns the name of this program
    split = ctypes.windll.shell32.CommandLineToArgvW  # type: ignore[attr-defined,unused-ignore]
    split.restype = ctypes.POINTER(ctypes.c_wchar_p)
    count = ctypes.c_int()
    words = split(ctypes.c_wchar_p(text.strip()), ctypes.byref(count))
    try:
        return [str(words[index]) for index in range(count.value)]
    finally:
        free = ctypes.windll.kernel32.LocalFree  # type: ignore[attr-defined,unused-ignore]
        free(words)


def _refuse_shell(words: Sequence[str]) -> None:
    """Raise OptionError for words that only a shell would understand: no shell reads them."""
    for word in words:
        if word in OPERATORS or word.endswith(";"):
            raise OptionError(f"--{ON_END}: {word} is for a shell, and none reads this command. {_AS_SHELL}")
        if any(start in word for start in VARIABLES):
            raise OptionError(
                f"--{ON_END}: {word} is replaced by a shell, and none reads this command. Let the program "
                f"read the variable from its environment, or give the line to a shell: "
                f"--{ON_END} \"bash -c '...'\""
            )


def _explain_missing(program: str) -> str:
    """Return why a program cannot be started, and what to do."""
    path = Path(program)
    if path.is_dir():
        return "is a folder. Give a program"
    if path.suffix == ".py":
        return f'is a script. Start it with Python: --{ON_END} "python {program}"'
    if path.is_file():
        return f"is a file that may not be executed, or is not below ./. Give ./{program}, or chmod +x it"
    return "is no program that can be started here. Correct the name, or give the whole path"
