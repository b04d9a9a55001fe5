"""The tools by name, and the options of a single tool or of a chain of tools.

Scripts, `--then` and `--post` know the tools by these names. Standard library only.
"""

import argparse
import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.command import did_you_mean, quote_command
from modules.errors import OptionError, UserError
from modules.installation import ONLY_OPTIONS, ROOT
from modules.options import Options, option_values, read_options
from modules.parser import Parser, add_options
from postprocessing.options import (
    BlurOptions,
    FacefixOptions,
    InterpolationOptions,
    ToolRunOptions,
    UpscalerOptions,
)

THEN = "--then"
HELP = {"-h", "--help"}


@dataclass(frozen=True)
class Tool:
    """A postprocessing tool: its names, its options, and its suffix for file names."""

    name: str
    aliases: tuple[str, ...]  # other names, in lower case
    record: type[Options]
    added: Callable[[Any], str]  # options -> SWINIR, VFI
    needs_video: bool = False  # whether it needs several images
    hides: bool = False  # whether the result, including a cover image, must not show the source


TOOLS = (
    Tool("upscaler", ("upscale",), UpscalerOptions, lambda options: options.mode.upper()),
    Tool("GIMMVFI", ("gimmvfi", "interpolate"), InterpolationOptions, lambda _: "VFI", needs_video=True),
    Tool("facefix", (), FacefixOptions, lambda options: options.mode.upper()),
    Tool("yolo_blur", ("blur",), BlurOptions, lambda _: "blur", hides=True),
)
ToolOptions = tuple[Tool, Any]  # a tool and the record of its options


@dataclass(frozen=True)
class Chain:
    """Options of one postprocessing run: its files, and its tools in order."""

    run: ToolRunOptions
    tools: tuple[ToolOptions, ...]

    @property
    def added(self) -> str:
        """Text about all tools that is added to the names of result files."""
        return "_".join(tool.added(options) for tool, options in self.tools)

    @property
    def labels(self) -> list[str]:
        """Labels for progress bars: "" for the first tool, "--then NAME" for the others."""
        return ["", *(f"{THEN} {tool.name}" for tool, _ in self.tools[1:])]

    @property
    def needs_video(self) -> bool:
        """Whether a tool works on several frames, so that single images are rejected."""
        return any(tool.needs_video for tool, _ in self.tools)

    @property
    def hides(self) -> bool:
        """Return whether a tool hides image content, so that results must not contain the original image."""
        return hiding_tool(self.tools) is not None


def read_chain(tool: str, description: str, argv: Sequence[str] | None = None) -> Chain:
    """Parse the command line of a postprocessing script, including the tools after each `--then`.

    Invalid options end the program as in argparse. Raises OptionError if two options contradict each other.
    """
    if argv is None:
        argv = sys.argv[1:]
    # --then starts the arguments of the next tool
    first, *later_tools = split_by_mark(split_assigned(argv, THEN), THEN)
    parser = Parser(description=description)
    before = f"{parser.prog} {THEN}"
    chosen = find_tool(tool)
    add_options(parser, ToolRunOptions, chosen.record)
    _add_then(parser)
    # print the help of a later tool, which ends the program, even if the first one lacks required options
    for later in later_tools:
        if HELP & set(later):
            read_tool(later, before)
    args = _parse(parser, chosen, first)
    if args.then is not None:  # an abbreviation, such as --the, which the split above has not found
        parser.error(f"write {THEN} in full")
    run = read_options(ToolRunOptions, args)
    tools: list[ToolOptions] = [(chosen, read_options(chosen.record, args))]
    for later in later_tools:
        name = " ".join([THEN, *later[:1]])
        with name_tool(name):
            tools.append(read_tool(later, before))
    if os.environ.get(ONLY_OPTIONS):  # a caller only wants to know whether the options are valid
        raise SystemExit(0)
    return Chain(run, tuple(tools))


def _add_then(parser: Parser) -> None:
    group = parser.add_argument_group("several tools in one run")
    group.add_argument(
        THEN,
        metavar="TOOL ...",
        help="give each picture on to another tool, without a file in between. Behind the tool's name stand "
        f"its own options ({THEN} upscaler --help lists them; without --model the downloaded one is taken), "
        f"before the first {THEN} what holds for the whole run. May be repeated. The tools: "
        f"{', '.join(tool.name for tool in TOOLS)}",
    )


@dataclass(frozen=True)
class NamedTools:
    """The postprocessing tools that an option names, in their order of use."""

    option: str  # for messages
    tools: tuple[ToolOptions, ...]

    @property
    def labels(self) -> list[str]:
        """Labels for progress bars: the option's name with each tool's name."""
        return [f"{self.option} {tool.name}" for tool, _ in self.tools]

    @property
    def hiding(self) -> str | None:
        """Name of the first tool that hides image content; None if there is none."""
        return hiding_tool(self.tools)

    @property
    def in_words(self) -> str:
        """Tools and settings as text for metadata, joined by "--then"."""
        return f" {THEN} ".join(tool_in_words(tool, options) for tool, options in self.tools)


def read_named_tools(texts: Sequence[str], option: str) -> NamedTools:
    """Parse the value of an option such as `upscaler scale=2 model=x.pth --then gimmvfi model=y`.

    Unknown options of a tool end the program, as argparse does.

    Args:
        texts: Words of the option.
        option: Option with the texts, for messages.

    Raises:
        OptionError: If a tool or a value is not valid.
    """
    tools = []
    for text in texts:
        for words in split_by_mark(split_assigned(split_words(text), THEN), THEN):
            if not words:
                raise OptionError(
                    f"{option} {text!r}: the name of a tool is missing. Give {tool_names()}, and its options."
                )
            with name_tool(f"{option} {words[0]}"):
                tools.append(read_tool(words, option))
    return NamedTools(option, tuple(tools))


def read_tool(words: Sequence[str], before: str) -> ToolOptions:
    """Parse the name and the options of one postprocessing tool: `facefix --weight 0.7` or `weight=0.7`.

    Without a model option, the downloaded model is used. Asking for help ends the program.

    Args:
        words: The name and the options.
        before: Words before the name in a command, for messages.

    Raises:
        OptionError: If the tool is unknown or an option is not valid.
    """
    if not words:
        raise OptionError(f"the name of a tool is missing. Give {tool_names()}.")
    tool = find_tool(words[0])
    parser = Parser(prog=f"{before} {tool.name}", description=f"Options of {tool.name}.")
    add_options(parser, tool.record)
    # options of the whole run are known here only to reject them
    run_parser = Parser(add_help=False)
    add_options(run_parser, ToolRunOptions)
    tool_flags = _list_flags(parser)
    run_flags = _list_flags(run_parser)
    typed_words = [_as_typed_word(word, {**run_flags, **tool_flags}) for word in words[1:]]
    for word in typed_words:
        name = word.partition("=")[0]
        if name in run_flags and name not in tool_flags:
            raise OptionError(f"{name} holds for the whole run. Write it before the first {THEN}.")
    return tool, read_options(tool.record, _parse(parser, tool, typed_words))


def _as_typed_word(word: str, flags: Mapping[str, argparse.Action]) -> str:
    """Return a chain argument as on a command line: `--factor=2` for `factor=2`."""
    name, has_value, _ = word.partition("=")
    flag = flags.get(f"--{name}")
    is_option = flag is not None and (has_value or flag.nargs == 0)
    return f"--{word}" if is_option else word


def _parse(parser: Parser, tool: Tool, words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of one postprocessing tool; --model defaults to the downloaded model.

    Raises OptionError if the model is neither given nor downloaded.
    """
    _list_flags(parser)["--model"].required = False
    args = parser.parse_args(words)
    if args.model is None:
        args.model = default_model(tool.name, getattr(args, "mode", ""))
    if args.model is None:
        parser.error("the following arguments are required: --model")
    return args


def find_tool(name: str) -> Tool:
    """Return the postprocessing tool with a name, ignoring case.

    Raises:
        OptionError: If there is no such tool.
    """
    for tool in TOOLS:
        if name.lower().removesuffix(".py") in {tool.name.lower(), *tool.aliases}:
            return tool
    names = [tool.name for tool in TOOLS]
    raise OptionError(f"{name} is no tool. Use {', '.join(names)}.{did_you_mean(name, names)}")


def hiding_tool(tools: Sequence[ToolOptions]) -> str | None:
    """Return the name of the first tool that hides image content, such as faces; None if none does."""
    return next((tool.name for tool, _ in tools if tool.hides), None)


def tool_names() -> str:
    """Return the names of all tools as a list for messages."""
    names = [tool.name for tool in TOOLS]
    return f"{', '.join(names[:-1])} or {names[-1]}"


@contextlib.contextmanager
def name_tool(name: str) -> Iterator[None]:
    """Prefix UserErrors in the `with` block with the tool's name, unless they have the prefix already."""
    try:
        yield
    except UserError as error:
        if name and not str(error).startswith(f"{name}: "):
            error.args = (f"{name}: {error}", *error.args[1:])
        raise


def tool_in_words(tool: Tool, options: Any) -> str:
    """Return a tool with its settings as text for metadata, such as `upscaler model=x.pth scale=2.0`.

    Paths are reduced to file names, so that folders stay private.
    """
    words = [tool.name]
    for name, value in option_values(options).items():
        if value not in (None, False, ""):
            shown = value.name if isinstance(value, Path) else value
            words.append(shlex.quote(f"{name}={shown}") if value is not True else name)
    return " ".join(words)


def split_words(text: str) -> list[str]:
    """Split the value of --post into arguments; quotes protect spaces, backslashes are literal."""
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        return list(lexer)
    except ValueError:
        raise OptionError(f"{text}: a quotation mark is not closed. Put one at its end.") from None


def split_by_mark(words: Sequence[str], mark: str) -> list[list[str]]:
    """Split a list of arguments at each `mark`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == mark:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def split_assigned(words: Sequence[str], flag: str) -> list[str]:
    """Split each `flag=value` argument into two."""
    parts: list[str] = []
    for word in words:
        parts += word.split("=", 1) if word.startswith(f"{flag}=") else [word]
    return parts


def _list_flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings}


logger = logging.getLogger(__name__)

# default of --to in tools/download.py
MODELS = Path("models")
# --mode -> tasks of tools/download.py --family tools, where they have another name; tools without it: ""
TASKS = {"esrgan": ("realesrgan_x4", "realesrgan_x2"), "": ("yunet",)}


def default_model(tool: str, mode: str, folders: Sequence[Path] = (MODELS, ROOT / MODELS)) -> Path | None:
    """Return the path of a tool's downloaded model, and log it; None if the tool has no such mode.

    Args:
        tool: Name of the tool in `TOOLS`.
        mode: Value of --mode, "" for tools without modes.
        folders: Folders of downloaded models; the first one with all files of the first task is used.

    Raises:
        OptionError: If no folder has the files; the message contains the download command.
    """
    from downloads.catalogue import model_sets  # only without --model

    sets = model_sets()
    models = {model_set.task: model_set.components[0] for model_set in sets if model_set.family == "tools"}
    tasks = [task for task in TASKS.get(mode, (mode,)) if task in models]
    if not tasks:
        return None  # the tool reports the unknown mode
    for task in tasks:
        model = models[task]
        for folder in folders:
            if all((folder / file.name).is_file() for file in model.files):
                path = folder / model.path
                logger.info("%s: --model is not given; %s is used", tool, path)
                return path
    command = quote_command(["python", "tools/download.py", "--family", "tools", "--task", tasks[0]])
    missing = folders[0] / models[tasks[0]].files[0].name
    raise OptionError(
        f"no model is given, and {missing} is not there.\n  Give --model FILE (model=FILE in a chain), or "
        f"download it: {command}"
    )
