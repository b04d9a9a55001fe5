"""The command `reelsmith` of the installed package: words that name a script, such as `train wan`.

Standard library only, and no script is imported but the one that is asked for.
"""

import ast
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.version import VERSION

PROGRAM = "reelsmith"
# a script's name -> what follows `reelsmith`; other scripts keep their name, with - for _
WORDS = {
    r"(\w+)_train_network": "train {family}",
    r"(\w+)_train": "finetune {family}",
    r"(\w+)_generate_(?:video|image)": "generate {family}",
    r"(?:(\w+)_)?cache_latents": "cache latents {family}",
    r"(?:(\w+)_)?cache_text_encoder_outputs": "cache text {family}",
    r"(\w+)_lora": "{family}",  # merge, convert, flux-merge
}
FAMILY = "hv"  # of scripts that name none
TOOLS = ("blissful_tuner", "networks")  # the rooms that have scripts too
OF_A_CHECKOUT = {"quickstart", "run_tests"}  # scripts that set up a checkout; the package has none of them


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
        """Its name as a module: `wan_train_network`, `blissful_tuner.metaview`."""
        room = self.path.parent.name
        return f"{room}.{self.script}" if room in TOOLS else self.script


def find_commands(folder: Path) -> list[ScriptCommand]:
    """Return the commands of all scripts in a checkout's or the package's folder, by their words.

    A script is a file there, or in one of its rooms of tools, that runs `command_line`.
    """
    commands = []
    for path in (*folder.glob("*.py"), *(path for room in TOOLS for path in (folder / room).glob("*.py"))):
        text = path.read_text(encoding="utf-8")
        if path.stem in OF_A_CHECKOUT or not re.search(r"^ +command_line\(", text, re.MULTILINE):
            continue
        commands.append(ScriptCommand(tuple(name_words(path.stem).split()), path))
    return sorted(commands, key=lambda command: command.words)


def name_words(script: str) -> str:
    """Return what follows `reelsmith` for a script: `train wan` for wan_train_network."""
    for pattern, words in WORDS.items():
        match = re.fullmatch(pattern, script)
        if match:
            return words.format(family=(match[1] or FAMILY).replace("_", "-"))
    return script.replace("_", "-")


def read_summary(command: ScriptCommand) -> str:
    """Return the first sentence of a script's docstring."""
    text = ast.get_docstring(ast.parse(command.path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", text)[0]


def main() -> None:
    """Run the command that the words name; without one, list what there is."""
    words = sys.argv[1:]
    commands = find_commands(Path(__file__).resolve().parent)
    command = next((one for one in commands if tuple(words[: len(one.words)]) == one.words), None)
    if command is not None:
        name = " ".join((PROGRAM, *command.words))
        sys.argv = [name, *words[len(command.words) :]]  # the name that its help and messages show
        importlib.import_module(f"{__package__}.{command.module}").run()
    elif words[:1] in (["--version"], ["-V"]):
        print(f"{PROGRAM} {VERSION}")
    else:
        _explain(commands, words)


def _explain(commands: Sequence[ScriptCommand], words: Sequence[str]) -> None:
    """List the commands that begin with these words. Exits with code 2 if help was not asked for."""
    asks = not words or words[-1] in {"-h", "--help", "help"}
    begun = tuple(words[:-1] if words and asks else words)
    found = [one for one in commands if one.words[: len(begun)] == begun]
    if found and asks:
        print(_listing(found))
        return
    if found:
        message = f"{' '.join(begun)}: which one? {', '.join(' '.join(one.words) for one in found)}"
    else:
        typed = " ".join(word for word in begun[:3] if not word.startswith("-"))
        known = {" ".join(one.words): one for one in commands}
        same = [name for name, one in known.items() if sorted(one.words) == sorted(typed.split())]
        near = same or difflib.get_close_matches(typed, known, 1)
        hint = f" Did you mean {PROGRAM} {near[0]}?" if near else ""
        message = f"{typed or begun[0]!r} is no command.{hint}"
    print(f"{PROGRAM}: error: {message}\n{PROGRAM} --help lists all commands", file=sys.stderr)
    raise SystemExit(2)


def _listing(commands: Sequence[ScriptCommand]) -> str:
    width = max(len(" ".join(one.words)) for one in commands)
    lines = [f"  {' '.join(one.words):{width}}  {read_summary(one)}" for one in commands]
    return "\n".join(
        (
            f"usage: {PROGRAM} COMMAND [options]    {PROGRAM} COMMAND --help lists the options of one",
            "",
            *lines,
            "",
            "hv: HunyuanVideo and SkyReels V1; fpack: FramePack.",
            f"Each has the name of its script too: {commands[0].script} is {PROGRAM} "
            f"{' '.join(commands[0].words)}.",
        )
    )
