"""What every script shares: logging, clean error output, exit codes.

Standard library only, so that `--help` answers at once.
"""

import argparse
import atexit
import contextlib
import difflib
import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from modules.control_codes import escape_control_codes, shorten, shorten_lines
from modules.errors import CheckpointError, UserError
from modules.installation import check_requirements, command_words
from modules.paths import path_exists

PATIENCE = 2.0  # seconds within which a launcher ends the others
INTERRUPTED = 130  # the shell's code for a program ended by Ctrl-C
MOST_LINES = 3  # of a message; a hint below it is one of them
MOST_OF_LINE = 2000  # characters of a line of a message
MOST_OF_WORD = 240  # characters of a typed word in a message
# type of an option -> what it takes, in words
NUMBERS: dict[Any, str] = {int: "a whole number", float: "a number"}
# what word processors and web pages make of --
_DASHES = re.compile(
    "^(?=.{0,1}[\u2010-\u2015\u2212\ufe58\ufe63\uff0d])[-\u2010-\u2015\u2212\ufe58\ufe63\uff0d]+(?=[A-Za-z])"
)
SWITCHES = {"true", "false", "yes", "no", "on", "off", "1", "0"}
_LINE_ENDS = {"\\", "^", "`", " "}
_MISSING = "the following arguments are required: "  # as argparse says it
_JOINED = re.compile(r"(\d+)[x*×,:](\d+)", re.IGNORECASE)  # 480x832


def start_logging(level: int = logging.INFO) -> None:
    """Send log lines to standard error, in UTF-8 if the stream can; coloured on a terminal.

    Calling it again changes nothing.
    """
    unicode = "utf" in (sys.stderr.encoding or "").lower()  # what the terminal itself can show
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter(wants_colour(sys.stderr), draws_boxes(sys.stderr), unicode))
    logging.basicConfig(level=level, handlers=[handler])


def draws_boxes(stream: Any) -> bool:
    """Return whether the stream is a terminal that can show more than plain lines."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def wants_colour(stream: Any) -> bool:
    """Return whether to write ANSI colours: to a terminal that knows them, if NO_COLOR is not set."""
    if os.environ.get("NO_COLOR") or not draws_boxes(stream):
        return False
    return os.name != "nt" or _turn_on_colours()


def _turn_on_colours() -> bool:
    """Let a Windows console understand ANSI codes. Returns whether it does."""
    import ctypes  # only there

    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    is_done = True
    for number in (-11, -12):  # standard output and error
        handle, mode = kernel32.GetStdHandle(number), ctypes.c_ulong()
        if kernel32.GetConsoleMode(handle, ctypes.byref(mode)):  # else it is no console
            is_done = bool(kernel32.SetConsoleMode(handle, mode.value | 4)) and is_done
    return is_done


@contextlib.contextmanager
def each_warning_once() -> Iterator[None]:
    """Show no warning twice inside the block: each line of a prompt file would repeat those about options."""
    filters = [(handler, _once()) for handler in logging.getLogger().handlers]
    for handler, is_new in filters:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler, is_new in filters:
            handler.removeFilter(is_new)


def _once() -> Callable[[logging.LogRecord], bool]:
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_repeated = record.levelno == logging.WARNING and message in told
        told.add(message)
        return not is_repeated

    return is_new


def command_line(
    main: Callable[[], None],
    explain: Callable[[Path], str | None] | None = None,
    needs_packages: bool = True,
) -> None:
    """Run `main` as a program: print a UserError without a traceback and exit with its code.

    explain: given the file of a CheckpointError, returns what that file really is, or None; printed as a
    hint. needs_packages: end at once if a package of requirements.txt is missing, but show the help without.
    """
    start_logging()
    try:
        if needs_packages and not {"-h", "--help"} & set(sys.argv[1:]):
            check_requirements()
        main()
    except UserError as error:
        _let_the_first_tell()
        print(plain_message(f"{type(error).__name__}: {error}", sys.argv), file=sys.stderr)
        has_room = str(error).count("\n") + 1 < MOST_LINES
        if isinstance(error, CheckpointError) and error.path is not None and explain is not None and has_room:
            hint = explain(error.path)
            both_say = "looks like" in str(error) and "looks like" in (hint or "")
            if hint and hint not in str(error) and not both_say:
                print(plain_message(f"  {error.path.name}: {hint}.", sys.argv), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    finally:
        # Ctrl-C while Python ends would print tracebacks of what cleans up; registered last, this runs first
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


def _let_the_first_tell() -> None:
    """Wait a little unless this is the first process of a launcher on this machine.

    If that one has the same error, the launcher ends this one meanwhile, and it is told once.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)


def plain_message(text: str, typed: Sequence[str] = ()) -> str:
    """Return a message as a console can show it: control codes are written out, long lines shortened.

    typed: words of the command line; in the message each is one line, and a long one is shortened.
    """
    for word in typed:
        for part in (word, word.partition("=")[2]):
            if len(part) > MOST_OF_WORD or "\n" in part:
                text = text.replace(part, _one_line(part))
    return shorten_lines(escape_control_codes(text), MOST_OF_LINE)


def _one_line(word: str) -> str:
    return shorten(word, MOST_OF_WORD).replace("\n", "\\n")


class Parser(argparse.ArgumentParser):
    """Parser of a script's options.

    A mistake gives one message, with the option or value that was probably meant, and exit code 2. Help shows
    defaults, and colours on a terminal.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"formatter_class": _HelpFormatter, **settings})

    def print_help(self, file: Any = None) -> None:
        """Print the help as argparse does, in colour on a terminal."""
        file = file or sys.stdout
        text = self.format_help()
        self._print_message(_colour_help(text) if wants_colour(file) else text, file)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does, but report mistyped options before missing ones, often the same option."""
        words = sys.argv[1:] if args is None else list(args)
        if not {"-h", "--help"} & set(words):
            self._refuse_line_end(words)
            self._refuse_unknown(words)
            self._refuse_joined(words)
        found, others = self.parse_known_args(words, namespace)
        if others:
            self.error(self._explain_rest(words, others))
        return found

    def _explain_rest(self, words: Sequence[str], others: Sequence[str]) -> str:
        """Say what is wrong with words that belong to no option."""
        flags = {flag: action for action in self._actions for flag in action.option_strings}
        for before, path, word in zip(words, words[1:], words[2:], strict=False):
            is_one = before in flags and flags[before].nargs is None
            if is_one and word == others[0] and path_exists(Path(path)) and path_exists(Path(word)):
                return (
                    f"{before} takes one path and has {len(others) + 1}, {path} {word} ...: the shell put "
                    "all that fit in the place of a pattern (*). Give the one to use."
                )
        before = words[words.index(others[0]) - 1]
        if before in flags and flags[before].nargs == 0 and others[0].lower() in SWITCHES:
            return f"{before} is a switch: leave {others[0]} out, and to turn it off the switch too."
        if any(mark in word for word in words for mark in "“”„«»"):
            return (
                f"{as_typed(others)} belongs to no option: the quotation marks “ ” are typographic, and the "
                'shell knows straight ones only. Write "..." around a text with blanks.'
            )
        return f"{as_typed(others)} belongs to no option. Put a text with blanks in quotes."

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, without the list of all options."""
        if message.startswith(_MISSING):
            message = "\n  ".join(map(self._explain_missing, message.removeprefix(_MISSING).split(", ")))
        else:
            message = message.replace("\n", "\\n")
        message = plain_message(message, sys.argv)
        _let_the_first_tell()
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all options\n")

    def _explain_missing(self, name: str) -> str:
        """Say what an option is that must be given."""
        for action in self._actions:
            if name in {"/".join(action.option_strings), action.metavar, action.dest} and action.help:
                return f"{name} is missing: {action.help.replace('%%', '%')}"
        return f"{name} is missing"

    def _refuse_line_end(self, words: Sequence[str]) -> None:
        """Tell that lines were not joined: a sign at the end that another shell would have taken."""
        *others, last = words or [""]
        takes_it = any(others[-1] in one.option_strings and one.nargs != 0 for one in self._actions if others)
        if last in _LINE_ENDS and not takes_it:
            self.error(
                f"the command ends in '{last}', and its next line was not read: a line goes on with \\ as "
                "its very last character in bash, with ^ in cmd, with ` in PowerShell. Write one line"
            )

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        flags = {flag: action for action in self._actions for flag in action.option_strings}
        said: dict[str, None] = {}  # each message once, in order
        for before, word in pairwise(["", *words[: words.index("--") if "--" in words else None]]):
            name = word.partition("=")[0]
            is_number = self._negative_number_matcher.match(word) is not None
            plain = _DASHES.sub("--", name)
            if plain != name and " " not in name and any(flag.startswith(plain) for flag in flags):
                message = f"{name} begins with a typographic dash, not with --. Write {plain}"
                said[message] = None
            # argparse takes the beginning of an option too
            if not re.match(r"--.|-[^-]", name) or is_number or any(flag.startswith(name) for flag in flags):
                continue
            is_value = before in flags and flags[before].nargs != 0
            if " " in name or (" " in word and (is_value or not word.startswith("--"))):
                continue  # argparse takes what has blanks as a text
            if is_value and not word.startswith("--"):
                message = f"{word} is no option. A value that begins with - goes behind =: {before}={word}"
            else:
                near = did_you_mean(name.lstrip("-"), [flag[2:] for flag in flags if flag[:2] == "--"])
                message = f"Unknown option {name}.{near.replace('mean ', 'mean --') or ' Leave it out.'}"
            said[message] = None
        if said:
            self.error(" ".join(said))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            shown = _one_line(str(value))
            reason = getattr(action, "refused", {}).get(value)  # from `refuse_value`
            if reason is not None:
                raise argparse.ArgumentError(action, f"{value}: {reason}. Use {', '.join(choices)}.")
            raise argparse.ArgumentError(
                action, f"{shown} is no choice. Use {', '.join(choices)}.{did_you_mean(str(value), choices)}"
            )

    def _refuse_joined(self, words: Sequence[str]) -> None:
        """Say how to write two numbers if they are typed as one word: 480x832."""
        numbers = [action for action in self._actions if action.nargs == 2 and action.type in NUMBERS]
        pairs = {flag for action in numbers for flag in action.option_strings}
        typed = [part for word in words for part in (word.split("=", 1) if word[:2] == "--" else [word])]
        for before, word in pairwise(typed):
            found = _JOINED.fullmatch(word)
            if before in pairs and found is not None:
                self.error(f"{before} {word}: give two numbers: {before} {found[1]} {found[2]}")

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        """Count an option's values as argparse does, but say which ones are wanted if there are too few."""
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            if not isinstance(action.metavar, tuple):
                raise
        names, default = action.metavar, action.default
        example = f", such as {' '.join(map(str, default))}" if isinstance(default, list) else ""
        raise argparse.ArgumentError(action, f"give {len(names)} values: {' and '.join(names)}{example}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert a word as argparse does, but say in plain words what an option takes."""
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            if action.type not in NUMBERS:
                raise
        example = action.default if type(action.default) in NUMBERS else 1
        raise argparse.ArgumentError(
            action, f"{_one_line(arg_string)} is not {NUMBERS[action.type]}. Give one, such as {example:g}."
        )


def read_folder(about: str | None) -> Path:
    """Return the folder that a script is given as its only argument; about: the script's docstring."""
    parser = Parser(description=about)
    parser.add_argument("folder", type=Path, help="where it works")
    return Path(parser.parse_args().folder)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return " Did you mean NAME?" with the most similar name; empty if none is similar."""
    near = difflib.get_close_matches(given[:MOST_OF_WORD], list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""


def as_typed(words: Sequence[str]) -> str:
    """Return a command as a user types it, quoted for this system's shell.

    In the installed package, scripts are its console commands.
    """
    words = command_words(words)
    if os.name != "nt":
        return shlex.join(words)
    import subprocess  # only there

    return subprocess.list2cmdline(words)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to an option's help if it is a value and the text does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        is_value = default not in (None, "", argparse.SUPPRESS) and not isinstance(default, bool)
        if not is_value or "default" in text.lower() or hasattr(action, "unsupported_reason"):
            return text
        shown = str(default).replace("%", "%%")
        return f"{text} (default: {shown})" if len(shown) <= _LONGEST_DEFAULT else text


_LONGEST_DEFAULT = 80
_BOLD, _CYAN, _PLAIN = "\033[1m", "\033[36m", "\033[0m"


def _colour_help(text: str) -> str:
    text = re.sub(r"(?m)^(\S.*:)$|^usage:", rf"{_BOLD}\g<0>{_PLAIN}", text)
    return re.sub(r"(?<![\w-])--?[A-Za-z]\w*(?:-\w+)*", rf"{_CYAN}\g<0>{_PLAIN}", text)


class _LineFormatter(logging.Formatter):
    """Formats INFO as `message`, other levels as `WARNING: message`; control codes are escaped.

    A record with `draw` (modules/console.py) is drawn as a box on a terminal.
    """

    _colours = {
        logging.WARNING: "\033[33m",
        logging.ERROR: "\033[31m",
        logging.CRITICAL: "\033[31m",
        logging.DEBUG: "\033[2m",
    }

    def __init__(self, colour: bool, boxes: bool = False, unicode: bool = True) -> None:
        super().__init__("%(message)s")
        self._colour, self._boxes, self._unicode = colour, boxes, unicode

    def format(self, record: logging.LogRecord) -> str:
        draw: Callable[[bool, bool], str] | None = getattr(record, "draw", None)
        if draw is not None and self._boxes:
            return draw(self._colour, self._unicode)
        line = shorten_lines(escape_control_codes(super().format(record)), MOST_OF_LINE)
        if record.levelno != logging.INFO:
            line = f"{record.levelname}: {line}"
        start = self._colours.get(record.levelno) if self._colour else None
        return f"{start}{line}\033[0m" if start else line
