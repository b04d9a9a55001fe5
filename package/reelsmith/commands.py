"""The command `reelsmith`, in a checkout `python reelsmith.py`: words name a script, as `train wan` does.

Standard library only, and only the named script is imported.
"""

import ast
import contextlib
import difflib
import os
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.early_errors import explain_early_errors
from modules.installation import (
    CHECKOUT_SCRIPTS,
    EXTENSIONS,
    EXTENSIONS_FLAG,
    PREFIX,
    ROOT,
    SCRIPT_ROOMS,
    find_namesake,
    import_own,
)
from modules.screen import has_screen
from modules.script_words import has_own_command, name_words
from modules.version import VERSION

PROGRAM = "reelsmith" if PREFIX else "python reelsmith.py"
# headings of the list of all commands; between them those of families
FIRST_STEPS = "from a folder to a LoRA"
TOOLS = "tools"
# scripts that are listed first: the way from a folder to a LoRA
BEGINNER_SCRIPTS = {
    "doctor": "show what is installed here, and what is missing",
    "new_project": "describe a folder of clips or images for training",
    "caption_dataset": "write captions with a vision-language model",
    "run_project": "check, download, cache and train a described folder",
    "run_browser": "open a page to do all of this by clicks, watch runs and generate",
    "compare": "make a grid of clips or images from several LoRA files",
}
# It is the program of networks/sdxl_merge_lora.py under its second name in sd-scripts, with the same options:
# `sdxl-merge` runs it, and `merge` is merge_lora.py, which merges into a DiT.
EXCLUDED_SCRIPTS = {Path("networks", "merge_lora.py")}


@dataclass(frozen=True)
class ScriptCommand:
    """One command and the script behind it."""

    words: tuple[str, ...]  # "train", "wan"
    path: Path  # path of the script, such as wan_train_network.py

    @property
    def script(self) -> str:
        """Name of the script without `.py`, which is also its module's name."""
        return self.path.stem

    @property
    def name(self) -> str:
        """The command as it is typed after `reelsmith`: its words, separated by spaces."""
        return " ".join(self.words)

    @property
    def module(self) -> str:
        """Import name of the script's module, such as `wan_train_network` or `blissful_tuner.metaview`."""
        room = self.path.parent.name
        return f"{room}.{self.script}" if room in SCRIPT_ROOMS else self.script


def find_commands(folder: Path) -> list[ScriptCommand]:
    """Return the commands of all scripts in the folder of a checkout or the package, sorted by words.

    A script is a file in that folder or its subfolders `SCRIPT_ROOMS` that runs `command_line` or a `Script`.
    If a file name exists in both, only the script in `SCRIPT_ROOMS` becomes a command.
    """
    return [command for command in _name_files(folder) if _is_script(command.path)]


def _name_files(folder: Path) -> list[ScriptCommand]:
    """Return a command for each file that `find_commands` considers. The files are not read."""
    paths = {
        path.name: path
        for room in ("", *SCRIPT_ROOMS)
        for path in (folder / room).glob("*.py")
        if path.relative_to(folder) not in EXCLUDED_SCRIPTS
    }
    commands = [ScriptCommand(tuple(name_words(path.stem).split()), path) for path in paths.values()]
    return sorted(commands, key=lambda command: command.words)


def _is_script(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    runs = re.search(r"^ +(command_line|main\.run)\(", text, re.MULTILINE)
    return bool(runs) and path.stem not in CHECKOUT_SCRIPTS


def main() -> None:
    """Run the command that the user has typed; without a command, list the commands."""
    explain_early_errors()
    argv = sys.argv[1:]
    namesake = find_namesake() if PREFIX else None  # PREFIX is "" in a checkout
    if namesake is not None:
        print(f"Warning: {namesake}.", file=sys.stderr)
    if argv[:1] in (["help"], ["--help"], ["-h"]) and len(argv) > 1:  # `help train wan` is `train wan --help`
        argv = [*argv[1:], "--help"]
    if argv[:1] == [EXTENSIONS_FLAG] and len(argv) > 1:
        os.environ[EXTENSIONS] = argv[1]
        argv = argv[2:]
    command = _find_named(argv)
    if command is not None:
        _run_command(command, argv[len(command.words) :])
    elif argv[:1] in (["--version"], ["-V"]):
        print(f"{PROGRAM} {VERSION}")
    else:
        _list_or_reject(find_commands(ROOT), argv)


def _find_named(argv: Sequence[str]) -> ScriptCommand | None:
    """Return the command named by the first words of `argv`, reading only that command's script."""
    for command in _name_files(ROOT):
        if tuple(argv[: len(command.words)]) == command.words and _is_script(command.path):
            return command
    return None


def _run_command(command: ScriptCommand, options: Sequence[str]) -> None:
    from modules.table_answers import answer_script  # here: the list of commands needs no parser

    script = command.path.relative_to(ROOT)
    if PREFIX:  # help and messages show the words
        sys.argv = [f"{PROGRAM} {command.name}", *options]
        answer_script(script, options)
        import_own(command.module).run()
    else:
        sys.argv = [str(Path(sys.argv[0]).parent / script), *options]
        answer_script(script, options)
        runpy.run_path(str(command.path), run_name="__main__")


def _list_or_reject(commands: Sequence[ScriptCommand], argv: Sequence[str]) -> None:
    """Print the commands that begin with the typed words if the user asks for help; otherwise exit with 2."""
    # Without any words, print the commands that a beginner needs.
    asks_for_help = not argv or argv[-1] in {"-h", "--help", "help", "--all"}
    beginning = tuple(argv[:-1] if asks_for_help else argv)
    matching = [command for command in commands if command.words[: len(beginning)] == beginning]
    if matching and asks_for_help:
        text = _format_commands(matching) if argv else _format_first_steps(commands)
        with contextlib.suppress(BrokenPipeError):  # the user may have quit the pager
            print(text, flush=True)
        return
    if matching:
        names = ", ".join(command.name for command in matching)
        message = f"{' '.join(beginning)}: which one? {names}"
    else:
        message = _explain_unknown(commands, beginning)
    print(f"{PROGRAM}: error: {message}\n{PROGRAM} --all lists all commands", file=sys.stderr)
    raise SystemExit(2)


SIMILAR = 0.75  # minimum similarity between a mistyped command and the intended one; 1 means equal

# what others call a command -> what to type
_SYNONYMS = {
    "version": "--version",
    "models": "download --list",
    "list": "download --list",
    "train": "run FOLDER",
    "start": "run FOLDER",
    **dict.fromkeys(("resume", "continue"), "run FOLDER"),
    **dict.fromkeys(("init", "describe"), "new FOLDER"),
    **dict.fromkeys(("gui", "ui", "web", "webui", "page", "serve", "server"), "browser"),
}


def _explain_unknown(commands: Sequence[ScriptCommand], words: Sequence[str]) -> str:
    """Return the error message for an unknown command, with a likely suggestion."""
    # If commands begin with the first word, such as `train`, only their other words are compared. If this
    # finds none, or no command begins with it, a synonym of the first word is suggested first.
    typed_words = " ".join(word for word in words[:3] if not word.startswith("-"))
    names_by_ending = {
        " ".join(command.words[1:]): command.name for command in commands if command.words[0] == (words[0])
    }
    script = Path(words[0]).name.removesuffix(".py").replace("-", "_")
    suggestions = _list_matching(commands, typed_words, script)
    if not suggestions and names_by_ending:  # only the words after the first one are wrong
        # The command whose words after the first are most similar to `typed_ending`; [] if none is
        typed_ending = typed_words.partition(" ")[2]
        similar = difflib.get_close_matches(typed_ending, names_by_ending, 1)
        if not similar:
            similar = difflib.get_close_matches(typed_ending.partition(" ")[0], names_by_ending, 1)
        suggestions = [names_by_ending[ending] for ending in similar]
    elif not suggestions:
        suggestions = _list_similar(commands, typed_words, words[0])
    shown_suggestions = suggestions
    synonym = _SYNONYMS.get(words[0].lower())
    # a synonym is a better hint than similar words, unless a command begins with the first word
    if synonym is not None and not (names_by_ending and suggestions):
        shown_suggestions = [synonym]
    message = f"{typed_words or words[0]!r} is not a command."
    if shown_suggestions:
        message += f" Did you mean {PROGRAM} {' or '.join(shown_suggestions)}?"
    if names_by_ending and not suggestions:
        message += f" There are {', '.join(names_by_ending.values())}."
    return message


def _list_matching(commands: Sequence[ScriptCommand], typed: str, script: str) -> list[str]:
    """Return the names of commands that contain all typed words in any order, or whose script was typed."""
    typed_words = {*typed.split()}
    return [
        command.name
        for command in commands
        if command.script == script or (typed and typed_words <= {*command.words})
    ]


def _list_similar(commands: Sequence[ScriptCommand], typed: str, first_word: str) -> list[str]:
    """Return the name, or else the first word, of the command that is most similar to the typed words."""
    names = [command.name for command in commands]
    similar = difflib.get_close_matches(typed, names, 1, SIMILAR)
    if similar:
        return similar
    return difflib.get_close_matches(first_word, [*names, *(command.words[0] for command in commands)], 1)


def _summary(command: ScriptCommand) -> str:
    """Return the first sentence of a script's docstring."""
    text = ast.get_docstring(ast.parse(command.path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", text)[0]


USAGE = f"usage: {PROGRAM} COMMAND [options]    {PROGRAM} COMMAND --help lists the options of one"


def _format_first_steps(commands: Sequence[ScriptCommand]) -> str:
    """Return the help for beginners with the commands in `BEGINNER_SCRIPTS`; all commands if none exists."""
    by_script = {command.script: command for command in commands}
    first_commands = [by_script[script] for script in BEGINNER_SCRIPTS if script in by_script]
    if not first_commands:
        return _format_commands(commands)
    width = max(len(command.name) for command in first_commands)
    kinds = dict.fromkeys(command.words[0] for command in commands if len(command.words) > 1)
    lines = [USAGE, "", f"{FIRST_STEPS}:"]
    lines += [f"  {command.name:{width}}  {BEGINNER_SCRIPTS[command.script]}" for command in first_commands]
    if "run_browser" in by_script and has_screen():
        opening = f"{PROGRAM} {by_script['run_browser'].name}"
        lines += ["", f"To do this by clicks, type {opening}: it opens a page in your web browser."]
    lines += [
        "",
        f"The steps of each model: {', '.join(kinds)}. {PROGRAM} train --help lists the models.",
        f"{PROGRAM} --all lists all {len(commands)} commands.",
    ]
    return "\n".join(lines)


def _format_commands(commands: Sequence[ScriptCommand]) -> str:
    """Return a line for each command: first steps, commands of each family, tools."""
    width = max(len(command.name) for command in commands)
    families = sorted({command.words[-1] for command in commands if len(command.words) > 1})
    groups: dict[str, list[str]] = {FIRST_STEPS: [], **{name: [] for name in families}, TOOLS: []}
    for command in commands:
        line = f"  {command.name:{width}}  {_summary(command)}"
        groups[_get_group_heading(command, families)].append(line)
    lines = [USAGE]
    for name, group in groups.items():
        if group:
            lines += ["", f"{name}:", *group]
    lines += ["", "hv: HunyuanVideo and SkyReels V1; fpack: FramePack.", *_explain_script_names(commands)]
    return "\n".join(lines)


def _get_group_heading(command: ScriptCommand, families: Sequence[str]) -> str:
    """Return the heading under which a command is listed."""
    if command.script in BEGINNER_SCRIPTS:
        return FIRST_STEPS
    names = []
    for name in families:
        if command.words[-1] == name or command.words[0].startswith(f"{name}-"):
            names.append(name)
    return max(names, key=len, default=TOOLS)


def _explain_script_names(commands: Sequence[ScriptCommand]) -> list[str]:
    """Return the help about the commands that the package installs for each model's scripts."""
    shown = next((command for command in commands if has_own_command(command.script)), None)
    if shown is None:
        return []
    which = "Scripts of models are commands too" if PREFIX else "Each has the name of its script too"
    return [f"{which}: {shown.script} is {PROGRAM} {shown.name}."]
