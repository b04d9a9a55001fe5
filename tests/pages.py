"""What a page has from its first line to its last: commands, files that it shows, paths in its sentences."""

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from downloads.catalogue import model_sets

FILE = re.compile(r"\w[\w./ +-]*\.(?:html|jpg|jsonl?|mp[34]|npz|png|pth|safetensors|toml|txt|wav)")
SPAN = re.compile(r"`([^`]+)`")
PROGRAM = re.compile(r"python (?!-m pip )|accelerate launch (?!.* -m )|reelsmith ")
PLACEHOLDER = re.compile(r"[A-Z]{3,}")  # FOLDER, MODEL_FILE
FENCE = re.compile(r"^```(\w*)$")
SHOWN = re.compile(
    r"# ([\w./-]+\.(?:toml|txt|json|py))$"
)  # the first line of a block: it is this file's content
IMAGE = re.compile(r"--f (\w+)")  # in a prompt of gen_img.py
LISTED = re.compile(r"(\S+(?: \S+)*?)  +\S")  # a line of a list of the reader's files: path, meaning
# the pages whose files a page's commands use too
SOURCES = re.compile(r"use the files of ((?:\[[\w.]+\]\(\w+\.md[\w#-]*\)(?:, | and )?)+)")
LINK = re.compile(r"\]\((\w+)\.md")
# options whose value is written, not read
WRITTEN = frozenset(
    (
        *(
            "--dst_path",
            "--export",
            "--html",
            "--outdir",
            "--output",
            "--output_dir",
            "--output_file",
            "--output_high_noise",
            "--json",
            "--save_merged_model",
        ),
        *("--save_merged_model", "--save_path", "--save_to", "--to"),
    )
)


@dataclass(frozen=True)
class Brought:
    """A file that the page tells the reader to bring."""

    path: str


@dataclass(frozen=True)
class Shown:
    """A file that the page shows with its name."""

    path: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command line in a block of the shell."""

    words: tuple[str, ...]

    @property
    def script(self) -> str:
        return next((word for word in self.words if word.endswith(".py")), "")

    @property
    def arguments(self) -> list[str]:
        return [*self.words[self.words.index(self.script) + 1 :]]

    def value(self, option: str, default: str = "") -> str:
        """Return the word behind an option, unless it is an option too."""
        behind = self.words[self.words.index(option) + 1 :] if option in self.words else ()
        return behind[0] if behind and not behind[0].startswith("--") else default


@dataclass(frozen=True)
class Named:
    """The path of a file in a sentence or a table."""

    path: str


@dataclass(frozen=True)
class EndOfBlock:
    """The end of a block of commands or of a file: a sentence before it may name what it makes."""


Step = Brought | Shown | Command | Named | EndOfBlock


def read_page(text: str, left_out: str = "") -> Iterator[Step]:
    """Yield what a page has, in order. left_out: the heading of a part that is not read."""
    is_left_out = False
    block: list[str] = []
    kind: str | None = None  # the language of the block that a line is in
    for line in text.splitlines():
        fence = FENCE.match(line)
        if kind is None and line.startswith("#"):
            ends_part = _level(line) <= _level(left_out)
            is_left_out = line == left_out or (is_left_out and not ends_part)
        if fence is not None and kind is None:
            kind, block = fence.group(1), []
        elif fence is not None and kind is not None:
            if not is_left_out:
                steps = [*_read_block(kind, block)]
                yield from steps
                if not any(isinstance(step, Brought) for step in steps):
                    yield EndOfBlock()
            kind = None
        elif kind is not None:
            block.append(line)
        elif not is_left_out:
            yield from (Named(path) for span in SPAN.findall(line) for path in paths_in(span))


def _level(heading: str) -> int:
    return len(heading) - len(heading.lstrip("#"))


def _read_block(kind: str, lines: Sequence[str]) -> Iterator[Step]:
    shown = SHOWN.match(lines[0])
    if kind in ("bash", "sh"):
        yield from (parse_command(line) for line in lines_of(lines) if PROGRAM.match(line))
    elif shown is not None:
        yield Shown(shown.group(1), "\n".join([*lines[1:], ""]))
    elif kind == "text":
        listed = [LISTED.match(line) for line in lines]
        yield from (Brought(match.group(1)) for match in listed if match is not None)


def lines_of(block: Sequence[str]) -> Iterator[str]:
    """Yield the command lines of a block of the shell, without comments."""
    for line in "\n".join(block).replace("\\\n", " ").splitlines():
        command = re.split(r"(?:^|  +)#", line)[0].strip()
        if command:
            yield command


def sources_of(text: str) -> list[str]:
    """Return the names of the pages whose files a page says that its commands use."""
    return [name for links in SOURCES.findall(" ".join(text.split())) for name in LINK.findall(links)]


def parse_command(line: str) -> Command:
    """Return a command line as words, `--option=value` as two, `reelsmith` as in a checkout."""
    words: list[str] = []
    if line.startswith("reelsmith "):
        line = line.replace("reelsmith", "python reelsmith.py", 1)
    for word in shlex.split(line):
        option, _, value = word.partition("=")
        words += [option, value] if value and word.startswith("--") else [word]
    return Command(tuple(words))


def paths_in(span: str) -> Iterator[str]:
    """Yield the paths of files in a text that stands as code in a sentence, except those of outputs."""
    words = [span] if FILE.fullmatch(span) and " --" not in span else span.split()
    for before, word in zip(["", *words], words, strict=False):
        path = word.partition("=")[2] or word
        if FILE.fullmatch(path) and not PLACEHOLDER.search(path) and before not in WRITTEN:
            yield path


def outputs_of(command: Command, folder: Path) -> list[str]:
    """Return the paths, relative to the folder, of what a command that is typed there writes."""
    if "--dry_run" in command.words or "--plan" in command.words:
        return []
    if "--check" in command.words:
        return [command.value("--html")] if "--html" in command.words else []
    if "pocket.concepts" in command.words:
        return [f"{command.words[-1]}/blorp/dataset.toml"]
    script = command.script.rpartition("/")[2]
    if script == "download.py":
        return [] if "--list" in command.words else [*_downloaded(command)]
    if script == "gen_img.py":
        return [
            f"{command.value('--outdir')}/{name}.png" for name in IMAGE.findall(command.value("--prompt"))
        ]
    if script == "reelsmith.py":
        return [*_of_project(command.arguments, folder)]
    if "cache_" in script and "--dataset_config" in command.words:
        return _cache_folders(folder / command.value("--dataset_config"))
    called = command.value("--output_name") or command.value("--token_string")
    if "train" in script and called:
        name = f"{command.value('--output_dir')}/{called}"
        experts = ("_low_noise", "_high_noise") if "--lora_per_expert" in command.words else ("",)
        return [
            f"{name}.html",
            f"{name}-history.jsonl",
            *(f"{name}{expert}.safetensors" for expert in experts),
        ]
    if script.endswith("_to_comfy.py"):  # from, to
        return [word for word in command.arguments if not word.startswith("--")][1:]
    options = WRITTEN - {"--html", "--output_dir", "--to"}
    return [*filter(None, (command.value(option) for option in sorted(options)))]


def _downloaded(command: Command) -> Iterator[str]:
    family, task = command.value("--family"), command.value("--task")
    sets = [one for one in model_sets() if one.family == family and task in ("", one.task)]
    for component in (component for one in sets for component in one.components):
        yield from (f"{command.value('--to', 'models')}/{file.name}" for file in component.files)


def _of_project(arguments: Sequence[str], folder: Path) -> Iterator[str]:
    action, place = [*arguments, ""][:2]
    if action == "new":
        yield from (f"{place}/{name}" for name in ("dataset.toml", "prompts.txt", "run.toml"))
    if action == "run":
        training = tomllib.loads((folder / place / "run.toml").read_text(encoding="utf-8"))["training"]
        name = f"{place}/{training['output_dir']}/{training['output_name']}"
        yield from (f"{place}/check.html", f"{place}/cache", f"{name}.html", f"{name}.safetensors")


def _cache_folders(config: Path) -> list[str]:
    tables = tomllib.loads(config.read_text(encoding="utf-8"))["datasets"]
    return [table["cache_directory"] for table in tables if "cache_directory" in table]
