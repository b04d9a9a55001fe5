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
    options_class: type[Options]
    name_suffix: Callable[[Any], str]  # from its options: SWINIR, VFI
    needs_video: bool = False  # whether it needs several images
    hides_content: bool = False  # whether the result, including a cover image, must not show the source


TOOLS = (
    Tool("upscaler", ("upscale",), UpscalerOptions, lambda options: options.mode.upper()),
    Tool("GIMMVFI", ("gimmvfi", "interpolate"), InterpolationOptions, lambda _: "VFI", needs_video=True),
    Tool("facefix", (), FacefixOptions, lambda options: options.mode.upper()),
    Tool("yolo_blur", ("blur",), BlurOptions, lambda _: "blur", hides_content=True),
)
ToolOptions = tuple[Tool, Any]  # a tool and its parsed options, of `options_class`


@dataclass(frozen=True)
class Chain:
    """Options of one postprocessing run: its input and output files, and the tools in the order they run."""

    run: ToolRunOptions
    tools: tuple[ToolOptions, ...]

    @property
    def name_suffix(self) -> str:
        """Suffix for the names of result files, which describes all tools."""
        return "_".join(tool.name_suffix(options) for tool, options in self.tools)

    @property
    def labels(self) -> list[str]:
        """Labels for progress bars: "" for the first tool, "--then NAME" for the others."""
        return ["", *(f"{THEN} {tool.name}" for tool, _ in self.tools[1:])]

    @property
    def needs_video(self) -> bool:
        """Whether a tool works on several frames, so that single images are rejected."""
        return any(tool.needs_video for tool, _ in self.tools)

    @property
    def hides_content(self) -> bool:
        """Return whether a tool hides image content, so that results must not contain the original image."""
        return find_content_hiding_tool(self.tools) is not None


def read_chain(tool: str, description: str, argv: Sequence[str] | None = None) -> Chain:
    """Parse the command line of a postprocessing script, including the tools after each `--then`.

    Invalid options end the program as in argparse. Raises OptionError if two options contradict each other.
    """
    if argv is None:
        argv = sys.argv[1:]
    first_argv, *later_argvs = split_at_then(argv)
    parser = Parser(description=description)
    later_prog = f"{parser.prog} {THEN}"
    first_tool = find_tool(tool)
    add_options(parser, ToolRunOptions, first_tool.options_class)
    group = parser.add_argument_group("several tools in one run")
    group.add_argument(
        THEN,
        metavar="TOOL ...",
        help="give each image on to another tool, without a file in between. Behind the tool's name stand "
        f"its own options ({THEN} upscaler --help lists them; without --model the downloaded one is taken), "
        f"before the first {THEN} what holds for the whole run. May be repeated. The tools: "
        f"{', '.join(tool.name for tool in TOOLS)}",
    )
    # print the help of a later tool, which ends the program, even if the first one lacks required options
    for later_argv in later_argvs:
        if HELP & set(later_argv):
            parse_tool(later_argv, later_prog)
    args = _parse_with_default_model(parser, first_tool, first_argv)
    if args.then is not None:  # an abbreviation, such as --the, at which `split_at_then` does not split
        parser.error(f"write {THEN} in full")
    run = read_options(ToolRunOptions, args)
    tools: list[ToolOptions] = [(first_tool, read_options(first_tool.options_class, args))]
    for later_argv in later_argvs:
        with prefix_errors(" ".join([THEN, *later_argv[:1]])):
            tools.append(parse_tool(later_argv, later_prog))
    if os.environ.get(ONLY_OPTIONS):  # a caller only wants to know whether the options are valid
        raise SystemExit(0)
    return Chain(run, tuple(tools))


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
    def content_hiding_tool(self) -> str | None:
        """Name of the first tool that hides image content, such as faces; None if there is none."""
        return find_content_hiding_tool(self.tools)

    @property
    def in_words(self) -> str:
        """Tools and settings as text for metadata, joined by "--then"."""
        return f" {THEN} ".join(describe_tool(tool, options) for tool, options in self.tools)


def read_named_tools(values: Sequence[str], option: str) -> NamedTools:
    """Parse the values of an option such as `upscaler scale=2 model=x.pth --then gimmvfi model=y`.

    Unknown options of a tool end the program, as argparse does.

    Args:
        values: Values of the option; each names one or more tools.
        option: Name of the option, for messages.

    Raises:
        OptionError: If a tool or a value is not valid.
    """
    tools = []
    for value in values:
        for tool_argv in split_at_then(split_quoted(value)):
            if not tool_argv:
                raise OptionError(
                    f"{option} {value!r}: the name of a tool is missing. Pass {tool_names()}, and its "
                    "options."
                )
            with prefix_errors(f"{option} {tool_argv[0]}"):
                tools.append(parse_tool(tool_argv, option))
    return NamedTools(option, tuple(tools))


def parse_tool(argv: Sequence[str], prog: str) -> ToolOptions:
    """Parse the name and the options of one postprocessing tool: `facefix --weight 0.7` or `weight=0.7`.

    Without a model option, the downloaded model is used. Asking for help ends the program.

    Args:
        argv: The name and the options.
        prog: Beginning of the command up to the name, for messages.

    Raises:
        OptionError: If the tool is unknown or an option is not valid.
    """
    if not argv:
        raise OptionError(f"the name of a tool is missing. Pass {tool_names()}.")
    tool = find_tool(argv[0])
    parser = Parser(prog=f"{prog} {tool.name}", description=f"Options of {tool.name}.")
    add_options(parser, tool.options_class)
    # options of the whole run are known here only to reject them
    run_parser = Parser(add_help=False)
    add_options(run_parser, ToolRunOptions)
    tool_flags = _list_flags(parser)
    run_flags = _list_flags(run_parser)
    arguments = [_add_dashes(argument, {**run_flags, **tool_flags}) for argument in argv[1:]]
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag in run_flags and flag not in tool_flags:
            raise OptionError(f"{flag} applies to the whole run. Write it before the first {THEN}.")
    return tool, read_options(tool.options_class, _parse_with_default_model(parser, tool, arguments))


def _add_dashes(argument: str, flags: Mapping[str, argparse.Action]) -> str:
    """Return a tool's argument as on a command line: `--factor=2` for `factor=2`; values stay as they are."""
    name, has_value, _ = argument.partition("=")
    action = flags.get(f"--{name}")
    is_option = action is not None and (has_value or action.nargs == 0)
    return f"--{argument}" if is_option else argument


def _parse_with_default_model(parser: Parser, tool: Tool, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options of one postprocessing tool; --model defaults to the downloaded model."""
    _list_flags(parser)["--model"].required = False
    args = parser.parse_args(argv)
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
    raise OptionError(f"{name} is not a tool. Use {', '.join(names)}.{did_you_mean(name, names)}")


def find_content_hiding_tool(tools: Sequence[ToolOptions]) -> str | None:
    """Return the name of the first tool that hides image content, such as faces; None if none does."""
    return next((tool.name for tool, _ in tools if tool.hides_content), None)


def tool_names() -> str:
    """Return the names of all tools as a list for messages."""
    names = [tool.name for tool in TOOLS]
    return f"{', '.join(names[:-1])} or {names[-1]}"


@contextlib.contextmanager
def prefix_errors(name: str) -> Iterator[None]:
    """Prefix UserErrors in the `with` block with the tool's name, unless they have the prefix already."""
    try:
        yield
    except UserError as error:
        if name and not str(error).startswith(f"{name}: "):
            error.args = (f"{name}: {error}", *error.args[1:])
        raise


def describe_tool(tool: Tool, options: Any) -> str:
    """Return a tool with its settings as text for metadata, such as `upscaler model=x.pth scale=2.0`.

    Paths are reduced to file names, so that folders stay private.
    """
    arguments = [tool.name]
    for name, value in option_values(options).items():
        if value is True:
            arguments.append(name)
        elif value not in (None, False, ""):
            short_value = value.name if isinstance(value, Path) else value
            arguments.append(shlex.quote(f"{name}={short_value}"))
    return " ".join(arguments)


def split_quoted(text: str) -> list[str]:
    """Split the value of --post into arguments; quotes protect spaces, backslashes are literal."""
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        return list(lexer)
    except ValueError:
        raise OptionError(f"{text}: a quotation mark is not closed. Put one at its end.") from None


def split_at_then(argv: Sequence[str]) -> list[list[str]]:
    """Split arguments at each `--then TOOL` or `--then=TOOL`; each later list starts with the tool's name."""
    tools: list[list[str]] = [[]]
    for argument in argv:
        is_joined = argument.startswith(f"{THEN}=")
        for word in argument.split("=", 1) if is_joined else [argument]:
            if word == THEN:
                tools.append([])
            else:
                tools[-1].append(word)
    return tools


def _list_flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings}


logger = logging.getLogger(__name__)

# default of --to in tools/download.py
MODELS = Path("models")
# --mode ("" for tools without one) -> names of its tasks in tools/download.py, where they differ
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
    absent = folders[0] / models[tasks[0]].files[0].name
    raise OptionError(
        f"no model is given, and {absent} is not there.\n  Pass --model FILE (model=FILE in a chain), or "
        f"download it: {command}"
    )
