"""Parts that every script shares: logging, clean error output, exit codes.

Standard library only, so that `--help` answers at once.
"""

import contextlib
import difflib
import errno
import logging
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modules.control_codes import escape_control_codes, shorten, shorten_lines, terminal_width, wrap_text
from modules.errors import INTERRUPTED, CheckpointError, OptionError, UserError
from modules.installation import EXTENSIONS, ONLY_OPTIONS, check_requirements, command_words

# loggers with irrelevant warnings at import: bitsandbytes, on some processors
# loggers limited to errors; the second logs counts at its exit, the third each request
QUIET_LOGGERS = ("bitsandbytes.backends.cpu.ops", "torch._subclasses.fake_tensor", "httpx")
LAUNCHER_SECONDS = 2.0  # seconds in which a launcher ends the other processes
MAX_LINES = 3  # maximum lines of a message, including a hint below it
MAX_LINE_LENGTH = 2000  # characters of a line of a message
LISTS_OPTIONS = " --help lists all options"  # hint below an error in a terminal
MAX_WORD_LENGTH = 240  # characters of a typed word in a message
# variables of multi-process launchers: torchrun and accelerate, Intel MPI, Open MPI, MVAPICH
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
LAUNCHER_VARIABLES = (*RANK, *COUNT, *LOCAL_RANK, "LOCAL_WORLD_SIZE", "MASTER_PORT")
MAX_DIGITS = 10  # maximum digits of a launcher's number
PLAIN_IN_POWERSHELL = re.compile(r"[\w./\\:=+-]+")
_REMEDY = "Unset it, or start several processes with accelerate launch or torchrun"
LAUNCH = "accelerate launch --multi_gpu --num_processes N"


def start_logging(level: int = logging.INFO) -> None:
    """Send log lines to standard error, in UTF-8 if the stream can; colored on a terminal.

    Calling it again changes nothing. Closed streams are opened on the null device: otherwise the next files
    that are opened would get their descriptors, and messages would be written into these files.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by a service, a shell or pythonw.exe
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    unicode = "utf" in (sys.stderr.encoding or "").lower()  # what the terminal itself can show
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    # MAX_PIXELS is checked instead of Pillow's limit
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter(wants_color(sys.stderr), draws_boxes(sys.stderr), unicode))
    logging.basicConfig(level=level, handlers=[handler])
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def draws_boxes(stream: Any) -> bool:
    """Return whether a stream is a terminal that can display boxes and bars."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def wants_color(stream: Any) -> bool:
    """Return whether to write ANSI colors: to a terminal that knows them, if NO_COLOR is not set."""
    if os.environ.get("NO_COLOR") or not draws_boxes(stream):
        return False
    if os.name != "nt":
        return True
    import ctypes  # Windows only: its console needs a mode for ANSI codes

    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    is_done = True
    for number in (-11, -12):  # standard output and error
        handle = kernel32.GetStdHandle(number)
        mode = ctypes.c_ulong()
        if kernel32.GetConsoleMode(handle, ctypes.byref(mode)):  # fails if it is not a console
            # 4: ENABLE_VIRTUAL_TERMINAL_PROCESSING
            is_done = bool(kernel32.SetConsoleMode(handle, mode.value | 4)) and is_done
    return is_done


@contextlib.contextmanager
def drop_repeated_warnings() -> Iterator[None]:
    """Log each warning only once in the block, because each line of a prompt file would repeat it."""
    # each handler with a filter, which remembers the messages that the handler has logged
    filters = [(handler, partial(_is_new, set())) for handler in logging.getLogger().handlers]
    for handler, is_new in filters:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler, is_new in filters:
            handler.removeFilter(is_new)


def _is_new(messages: set[str], record: logging.LogRecord) -> bool:
    """Return False for a warning whose message is in `messages`; add the message of any record."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError, LookupError):  # an invalid record, which the handler itself reports
        return True
    is_repeated = record.levelno == logging.WARNING and message in messages
    messages.add(message)
    return not is_repeated


# a command in a message, whose options must keep that script's spelling
_COMMAND_IN_TEXT = re.compile(r"(?:\.py|(?<![\w-])(?:reelsmith [\w -]{,80}?\w|[a-z][^\W_]*+_\w++)) --\w")

_FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
_REPEATED_FLAG = re.compile(rf"({_FLAG.pattern}) \(\1\)")


@contextlib.contextmanager
def name_as_typed(names: Mapping[str, str]) -> Iterator[None]:
    """Spell options in warnings and errors of the block as the user typed them: --nf4, not --nf4_base.

    Args:
        names: Maps a flag, or a flag and its value, to the flag to show. Lines with a command remain
            unchanged.
    """
    if not names:
        yield
        return

    def respell(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            # suppressed: a message that does not fit its arguments, which logging itself reports
            with contextlib.suppress(TypeError, ValueError, LookupError):
                record.msg = respell_options(record.getMessage(), names)
                record.args = ()
        return True

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.filters.insert(0, respell)  # first, so that the innermost of nested blocks respells first
    try:
        yield
    except UserError as error:
        if error.args:
            error.args = (respell_options(str(error), names), *error.args[1:])
        raise
    finally:
        for handler in handlers:
            handler.removeFilter(respell)


def respell_options(text: str, names: Mapping[str, str]) -> str:
    """Replace flags in a message by the flags that the user typed, except in lines that contain a command.

    `names` maps a flag, or a flag and its value ("--mode fast"), to the typed flag.
    """
    lines = []
    for line in text.split("\n"):
        if not _COMMAND_IN_TEXT.search(line):
            for name, typed_flag in names.items():
                if " " in name:  # a flag and its value
                    line = re.sub(rf"{re.escape(name)}(?![\w-])", typed_flag, line)
            line = _FLAG.sub(lambda flag: names.get(flag[0], flag[0]), line)
            line = _REPEATED_FLAG.sub(r"\1", line)  # --dit (--dit)
        lines.append(line)
    return "\n".join(lines)


def command_line(
    main: Callable[[], None],
    explain: Callable[[Path], str | None] | None = None,
    needs_packages: bool = True,
) -> None:
    """Run `main` as a program: print a UserError without a traceback and exit with its code.

    `explain` gets the file of a CheckpointError and returns its real kind, which is printed as a hint, or
    None. With `needs_packages`, end at once if a package of requirements.txt is missing, unless the user asks
    for help.
    """
    start_logging()
    try:
        _check_launcher()
        if needs_packages and not {"-h", "--help"} & set(sys.argv[1:]):
            check_requirements()
        main()
    except UserError as error:
        _print_user_error(error, explain)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        cause = _explain_os_error(error)
        if cause is None:
            raise
        print(plain_message(f"OSError: {cause}"), file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt as stop:  # the exception's text may say what was saved
        print(f"Interrupted. {stop}".rstrip(), file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        from modules.compiler_errors import explain_compilation  # only after errors

        cause = explain_compilation(error)
        if cause is not None:
            _print_error(error, cause)
        elif draws_boxes(sys.stderr):
            from modules.console import show_traceback  # imported only after errors

            show_traceback()
        else:
            raise
        raise SystemExit(1) from None
    finally:
        # during the exit of Python, Ctrl-C would print tracebacks
        with contextlib.suppress(ValueError):  # outside the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _print_user_error(error: UserError, explain: Callable[[Path], str | None] | None) -> None:
    """Print a short error; for a model file, also say what the file is if the message does not."""
    _print_error(error, str(error), sys.argv)
    is_short = str(error).count("\n") + 1 < MAX_LINES
    if isinstance(error, CheckpointError) and error.path is not None and explain is not None and is_short:
        hint = explain(error.path)
        # the message may already name the file's kind, or this download command with more options
        is_repeated = "looks like" in str(error) and "looks like" in (hint or "")
        is_repeated = is_repeated or (hint or "-").removesuffix(" downloads it") in str(error)
        if hint and hint not in str(error) and not is_repeated:
            print(plain_message(f"  {error.path.name}: {hint}.", sys.argv), file=sys.stderr)


def _print_error(error: Exception, text: str, typed: Sequence[str] = ()) -> None:
    """Print the kind of an error and a text, wrapped; of several processes, usually only the first prints."""
    wait_for_first_process()
    message = plain_message(f"{type(error).__name__}: {text}", typed)
    print(wrap_text(message, terminal_width(sys.stderr)), file=sys.stderr)


def _explain_os_error(error: OSError) -> str | None:
    """Explain too many open files or a missing temporary folder, with advice; None for other errors."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open at once. Allow more of them (ulimit -n 4096) and run again."
    if "usable temporary directory" in str(error):  # message of Python's `tempfile`
        return f"{error.strerror}. Free some space, or set TMPDIR to a folder that can be written."
    return None


def _check_launcher() -> None:
    """Raise OptionError if a launcher's variables are not numbers, or a rank is not below its world size."""
    for name in LAUNCHER_VARIABLES:
        value = os.environ.get(name, "0")
        is_number = value.isascii() and value.removeprefix("-").isdigit() and len(value) < MAX_DIGITS
        if not is_number:
            raise OptionError(
                f"the environment has {name}={shorten_word(value)}, which is not a number. {_REMEDY}, which "
                "set it"
            )
    for rank_name, size_name in zip(RANK, COUNT, strict=True):
        rank = os.environ.get(rank_name)
        world_size = os.environ.get(size_name)
        if rank and world_size and not 0 <= int(rank) < int(world_size):
            raise OptionError(
                f"the environment has {rank_name}={rank} and {size_name}={world_size}: processes are "
                f"numbered from 0. {_REMEDY}, which set both"
            )


def begin_loading() -> None:
    """Print on a terminal that torch is being loaded; of several processes, only the first prints it.

    A script calls this after it has read its options. If only they are checked (ONLY_OPTIONS), it ends here.
    """
    if os.environ.get(ONLY_OPTIONS):
        raise SystemExit(0)
    if draws_boxes(sys.stderr) and "torch" not in sys.modules and os.environ.get("LOCAL_RANK", "0") == "0":
        print("Loading torch ...", file=sys.stderr, flush=True)


def wait_for_first_process() -> None:
    """Wait a little, unless this is a launcher's first process on this machine.

    If the first process has the same error, the launcher ends this one meanwhile, so that the error is
    printed only once.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(LAUNCHER_SECONDS)


def plain_message(text: str, typed: Sequence[str] = ()) -> str:
    """Make a message safe for a console: escape control codes and shorten long lines.

    `typed` are the command-line arguments. Where the message quotes them, line breaks are removed and long
    words are shortened.
    """
    for word in typed:
        for part in (word, word.partition("=")[2]):
            if len(part) > MAX_WORD_LENGTH or "\n" in part:
                text = text.replace(part, shorten_word(part))
    return shorten_lines(escape_control_codes(text), MAX_LINE_LENGTH)


def shorten_word(word: str) -> str:
    r"""Format a typed word for a message: shortened, with line breaks as \n."""
    return shorten(word, MAX_WORD_LENGTH).replace("\n", "\\n")


def did_you_mean(word: str, names: Iterable[str], min_similar: float = 0.6) -> str:
    """Return " Did you mean NAME?" with one of `names`; "" if none fits.

    NAME is the first match among: the most similar name; a name with the letters of `word` in another order;
    the longest name N such that `word` is N_...; the only name of the form `word`_...

    Args:
        word: Unknown word.
        names: Known names.
        min_similar: Minimum similarity of a name, from 0 to 1 (equal).
    """
    names = list(names)
    compared = word[:MAX_WORD_LENGTH]  # a hostile word has megabytes
    similar = difflib.get_close_matches(compared, names, n=1, cutoff=min_similar)
    if not similar:
        letters = sorted(compared)
        similar = [name for name in names if sorted(name) == letters]
    if similar:
        return f" Did you mean {similar[0]}?"
    beginnings = [name for name in names if name and word.startswith(f"{name}_")]
    if beginnings:
        return f" Did you mean {max(reversed(beginnings), key=len)}?"
    continuations = [name for name in names if word and name.lower().startswith(f"{word.lower()}_")]
    return f" Did you mean {continuations[0]}?" if len(continuations) == 1 else ""


def quote_command(argv: Sequence[str]) -> str:
    """Return a command quoted for this system's shell, as a user would type it.

    In the installed package, scripts are its console commands.
    """
    return quote_for_shell(typed_words(argv))


def typed_words(argv: Sequence[str]) -> list[str]:
    """Return a command as `command_words` does, with the extensions that are on."""
    return command_words(name_extensions(argv))


def name_extensions(argv: Sequence[str]) -> list[str]:
    """Return a command of this program in its form in a checkout, with the extensions that are on."""
    if not os.environ.get(EXTENSIONS):
        return [*argv]
    from modules.extension_words import add_extensions  # rarely needed

    return add_extensions(argv)


def quote_for_shell(argv: Sequence[str]) -> str:
    """Quote arguments as a command line for the shell of this system."""
    return shlex.join(argv) if os.name != "nt" else quote_for_windows(argv)


def quote_for_windows(argv: Sequence[str]) -> str:
    """Quote a command for cmd and PowerShell, in double quotes, except words that PowerShell would expand."""
    quoted = []
    for word in argv:
        if PLAIN_IN_POWERSHELL.fullmatch(word):
            quoted.append(word)
        elif re.search('["$`\u201c-\u201e]', word):
            quoted.append(quote_for_powershell([word]))
        else:
            end = word[len(word.rstrip("\\")) :]  # doubled, or it escapes the closing quote
            quoted.append(f'"{word}{end}"')
    return " ".join(quoted)


def quote_for_powershell(argv: Sequence[str]) -> str:
    """Quote a command for PowerShell: inside single quotes, only the single quote is special."""
    return " ".join(
        word
        if PLAIN_IN_POWERSHELL.fullmatch(word)
        else "'" + re.sub("(['\u2018-\u201b])", r"\1\1", word) + "'"
        for word in argv
    )


class _LineFormatter(logging.Formatter):
    """Formats INFO as `message`, other levels as `WARNING: message`; control codes are escaped.

    A record with `draw` (modules/console.py) is drawn as a box on a terminal.
    """

    _colors = {
        logging.WARNING: "\033[33m",
        logging.ERROR: "\033[31m",
        logging.CRITICAL: "\033[31m",
        logging.DEBUG: "\033[2m",
    }

    def __init__(self, colour: bool, boxes: bool = False, unicode: bool = True) -> None:
        super().__init__("%(message)s")
        self._color, self._boxes, self._unicode = colour, boxes, unicode

    def format(self, record: logging.LogRecord) -> str:
        draw: Callable[[bool, bool], str] | None = getattr(record, "draw", None)
        if draw is not None and self._boxes:
            return draw(self._color, self._unicode)
        line = shorten_lines(escape_control_codes(super().format(record)), MAX_LINE_LENGTH)
        if record.levelno != logging.INFO:
            line = f"{record.levelname}: {line}"
        line = wrap_text(line, terminal_width(sys.stderr) if self._boxes else None)
        start = self._colors.get(record.levelno) if self._color else None
        return f"{start}{line}\033[0m" if start else line
