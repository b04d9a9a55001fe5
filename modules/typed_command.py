"""Read a command that is the value of an option, and is started without a shell. Standard library only."""

import os
import shlex
from pathlib import Path

from modules.errors import OptionError

# help text of options that take a command
AT_END = (
    "run this command once the training has finished, stopped or failed; REELSMITH_STATE and other "
    "variables describe the result; it must be typed, because no file may start a program"
)
# programs whose first word is a script
INTERPRETERS = ("python", "bash", "sh", "zsh", "perl", "ruby", "node")
SHELLS = ("bash", "sh", "zsh", "fish", "cmd", "powershell", "pwsh")
# words that only a shell understands, and the prefixes of its variables
OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>", "2>&1", "&>"}
VARIABLES = ("$REELSMITH_", "${REELSMITH_", "%REELSMITH_")


def read_command(option: str, text: str) -> list[str]:
    """Split a command into arguments like this system's command line, and check that it can be started.

    `option` is the flag of its option.

    Raises:
        OptionError: If no program of this name can be started from the current folder, if its script does
            not exist, or if the command needs a shell.
    """
    argv = _split(option, text)
    if not argv or not argv[0]:
        raise OptionError(f'{option} is empty: pass a command, such as {option} "python notify.py"')
    import shutil  # imported here, because it is slow and --help does not need it

    program = argv[0]
    name = Path(program).name.lower().removesuffix(".exe")
    if name not in SHELLS:  # a shell may get operators among its arguments
        # Raise OptionError for shell syntax in a command, because commands are started without a shell
        as_shell = f"Put the line into a script, or pass it to a shell: {option} \"bash -c '...'\""
        for word in argv:
            if word in OPERATORS or word.endswith(";"):
                raise OptionError(f"{option}: {word} is for a shell, but none reads this command. {as_shell}")
            if any(start in word for start in VARIABLES):
                raise OptionError(
                    f"{option}: {word} is replaced by a shell, but none reads this command. Let the program "
                    f'read the variable from its environment, or pass the line to a shell: {option} "bash -c '
                    "'...'\""
                )
    if shutil.which(program) is None:
        raise OptionError(f"{option}: {program} {_explain_missing(option, program)}")
    script = argv[1] if len(argv) > 1 else "-"  # "-" stands for no script
    runs_script = name.rstrip("0123456789.") in INTERPRETERS and not script.startswith("-")
    if runs_script and not Path(script).is_file():
        raise OptionError(f"{option}: there is no script {script} in {Path.cwd()}. Fix the path")
    return argv


def _split(option: str, text: str) -> list[str]:
    """Split a command line into arguments, like a POSIX shell or, on Windows, like a Windows program."""
    if os.name == "nt":
        # Split a command line as Windows programs do, with the system's own function
        import ctypes  # exists only on Windows

        if not text.strip():
            return []  # the function would return this program's name
        split = ctypes.windll.shell32.CommandLineToArgvW  # type: ignore[attr-defined,unused-ignore]
        split.restype = ctypes.POINTER(ctypes.c_wchar_p)
        count = ctypes.c_int()
        argv = split(ctypes.c_wchar_p(text.strip()), ctypes.byref(count))
        try:
            return [str(argv[index]) for index in range(count.value)]
        finally:
            free = ctypes.windll.kernel32.LocalFree  # type: ignore[attr-defined,unused-ignore]
            free(argv)
        return None
    try:
        return shlex.split(text)
    except ValueError as error:
        raise OptionError(f"{option} {text}: {str(error).lower()}. Close the quotes, or omit them") from None


def _explain_missing(option: str, program: str) -> str:
    """Return a message that a program cannot be started, with advice."""
    path = Path(program)
    if path.is_dir():
        return "is a folder. Pass a program"
    if path.suffix == ".py":
        return f'is a script. Start it with Python: {option} "python {program}"'
    if path.is_file():
        return f"is a file that may not be executed, or is not below ./. Pass ./{program}, or chmod +x it"
    return "is not a program that can be started here. Fix the name, or pass the full path"
