"""The command `reelsmith`, in a checkout `python reelsmith.py`: words name a script, as `train wan` does.

Standard library only, and only the named script is imported.
"""

import ast
import contextlib
import difflib
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.installation import PREFIX, ROOT, SCRIPT_ROOMS, import_own
from modules.script_words import has_own_command, name_words
from modules.version import VERSION

PROGRAM = "reelsmith" if PREFIX else "python reelsmith.py"
# scripts that are listed first: the way from a folder to a LoRA
FIRST = {
    "doctor": "show what is installed here, and what is missing",
    "new_project": "describe a folder of clips or pictures for training",
    "caption_dataset": "write captions with a vision-language model",
    "run_project": "check, download, cache and train a described folder",
    "run_browser": "watch runs, edit captions and queue jobs in a web browser",
    "compare": "make a grid of clips or pictures from several LoRA files",
}
# scripts that set up a checkout, and its door to the commands; the package has none of them
OF_A_CHECKOUT = {"quickstart", "reelsmith", "run_tests"}


@dataclass(frozen=True)
class ScriptCommand:
    """One command and the script behind it."""

    words: tuple[str, ...]  # "train", "wan"
    path: Path  # of wan_train_network.py

    @property
    def script(self) -> str:
        return self.path.stem

    @property
    def module(self) -> str:
        """Return its name as a module: `wan_train_network`, `blissful_tuner.metaview`."""
        room = self.path.parent.name
        return f"{room}.{self.script}" if room in SCRIPT_ROOMS else self.script


def find_commands(folder: Path) -> list[ScriptCommand]:
    """Return the commands of all scripts in a checkout's or the package's folder, by their words.

    A script is a file there, or in one of `SCRIPT_ROOMS`, that runs `command_line` or a
    `Script`. A file at the root with the same name as one in a room is the same command.
    """
    commands = []
    paths = {path.name: path for room in ("", *SCRIPT_ROOMS) for path in (folder / room).glob("*.py")}
    for path in paths.values():
        text = path.read_text(encoding="utf-8")
        if path.stem in OF_A_CHECKOUT or not re.search(r"^ +(command_line|main\.run)\(", text, re.MULTILINE):
            continue
        commands.append(ScriptCommand(tuple(name_words(path.stem).split()), path))
    return sorted(commands, key=lambda command: command.words)


def main() -> None:
    """Run the command that the words name; without a command, list all."""
    words = sys.argv[1:]
    if words[:1] == ["help"] and len(words) > 1:
        words = [*words[1:], "--help"]
    commands = find_commands(ROOT)
    command = next((one for one in commands if tuple(words[: len(one.words)]) == one.words), None)
    if command is not None:
        rest = words[len(command.words) :]
        if PREFIX:  # help and messages show the words
            sys.argv = [" ".join((PROGRAM, *command.words)), *rest]
            import_own(command.module).run()
        else:
            sys.argv = [str(Path(sys.argv[0]).parent / command.path.relative_to(ROOT)), *rest]
            runpy.run_path(str(command.path), run_name="__main__")
    elif words[:1] in (["--version"], ["-V"]):
        print(f"{PROGRAM} {VERSION}")
    else:
        _explain(commands, words)


def _explain(commands: Sequence[ScriptCommand], words: Sequence[str]) -> None:
    """List the commands that begin with these words; without any, those that a beginner needs.

    Exits with code 2 if help was not asked for.
    """
    asks = not words or words[-1] in {"-h", "--help", "help", "--all"}
    begun = tuple(words[:-1] if words and asks else words)
    found = [one for one in commands if one.words[: len(begun)] == begun]
    if found and asks:
        text = _listing(found) if words else _list_first(commands)
        with contextlib.suppress(BrokenPipeError):  # of a pager that was left
            print(text, flush=True)
        return
    if found:
        message = f"{' '.join(begun)}: which one? {', '.join(' '.join(one.words) for one in found)}"
    else:
        typed = " ".join(word for word in begun[:3] if not word.startswith("-"))
        known = {" ".join(one.words): one for one in commands}
        script = Path(begun[0]).name.removesuffix(".py")
        same = [
            name
            for name, one in known.items()
            if sorted(one.words) == sorted(typed.split()) or one.script == script
        ]
        near = same or difflib.get_close_matches(typed, known, 1)
        near = near or difflib.get_close_matches(begun[0], known, 1)
        hint = f" Did you mean {PROGRAM} {near[0]}?" if near else ""
        message = f"{typed or begun[0]!r} is no command.{hint}"
    print(f"{PROGRAM}: error: {message}\n{PROGRAM} --all lists all commands", file=sys.stderr)
    raise SystemExit(2)


def _summary(command: ScriptCommand) -> str:
    """Return the first sentence of a script's docstring."""
    text = ast.get_docstring(ast.parse(command.path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", text)[0]


USAGE = f"usage: {PROGRAM} COMMAND [options]    {PROGRAM} COMMAND --help lists the options of one"


def _list_first(commands: Sequence[ScriptCommand]) -> str:
    """Return a line for each command of `FIRST`, and how to list the others; all if none of them is there."""
    by_script = {one.script: one for one in commands}
    first = [by_script[script] for script in FIRST if script in by_script]
    if not first:
        return _listing(commands)
    width = max(len(" ".join(one.words)) for one in first)
    kinds = dict.fromkeys(one.words[0] for one in commands if len(one.words) > 1)
    return "\n".join(
        (
            USAGE,
            "",
            "from a folder to a LoRA:",
            *(f"  {' '.join(one.words):{width}}  {FIRST[one.script]}" for one in first),
            "",
            f"The steps of each model: {', '.join(kinds)}. {PROGRAM} train --help lists the models.",
            f"{PROGRAM} --all lists all {len(commands)} commands.",
        )
    )


def _listing(commands: Sequence[ScriptCommand]) -> str:
    """Return a line for each command: first steps, commands of each family, tools."""
    width = max(len(" ".join(one.words)) for one in commands)
    families = sorted({one.words[-1] for one in commands if len(one.words) > 1})
    begin = "from a folder to a LoRA"
    groups: dict[str, list[str]] = {name: [] for name in (begin, *families, "tools")}
    for one in commands:
        begins = [name for name in families if one.words[-1] == name or one.words[0].startswith(f"{name}-")]
        group = begin if one.script in FIRST else max(begins, key=len, default="tools")
        groups[group].append(f"  {' '.join(one.words):{width}}  {_summary(one)}")
    lines = [line for name, group in groups.items() if group for line in ("", f"{name}:", *group)]
    return "\n".join(
        (
            USAGE,
            *lines,
            "",
            "hv: HunyuanVideo and SkyReels V1; fpack: FramePack.",
            *_name_scripts(commands),
        )
    )


def _name_scripts(commands: Sequence[ScriptCommand]) -> list[str]:
    """Return a line about the names of scripts: in the package those of models are commands too."""
    shown = next((one for one in commands if has_own_command(one.script)), None)
    if shown is None:
        return []
    which = "Scripts of models are commands too" if PREFIX else "Each has the name of its script too"
    return [f"{which}: {shown.script} is {PROGRAM} {' '.join(shown.words)}."]
