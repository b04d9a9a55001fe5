"""Pages are followed from the first line to the last: each file that they name exists, each command is taken.

Files that exist are those that the page asks the reader for, those that it shows with their names, and those
that its commands write. tests/test_docs.py runs the commands and shows that they write them.
"""

import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from downloads.catalogue import known_components
from package.reelsmith.commands import find_commands
from tests.commands import ROOT
from tests.downloads.test_catalogue import READERS
from tests.faults.messages import run_here
from tests.pages import (
    WRITTEN,
    Brought,
    Command,
    EndOfBlock,
    Named,
    Shown,
    outputs_of,
    paths_in,
    read_page,
    sources_of,
)
from tests.test_docs import PAGES, PASSES_ON, RAY, script_parser
from tests.test_printed_commands import WasReadError, ending_where_work_begins

ONE_WAY = (
    *(
        "README",
        "new_and_run",
        "small_cards",
        "wan",
        "wan22",
        "vace",
        "bernini",
        "wan_one_frame",
        "hunyuan_video",
        "skyreels",
        "framepack",
        "framepack_one_frame",
        "ltx2",
    ),
    *("krea2", "z_image", "qwen_image", "flux_2", "flux_3", "flux_kontext", "hunyuan_image", "lumina"),
    *("anima", "sdxl", "stable_diffusion"),
)
# pages; of one with two ways, the heading of the other way
WALKS = {
    "first_lora, in two commands": ("first_lora", "### By hand"),
    "first_lora, by hand": ("first_lora", "### In two commands"),
    **{name: (name, "") for name in ONE_WAY},
}
# pages about one subject, whose sentences name files of all kinds
OTHERS = [page.stem for page in PAGES if page.parent != ROOT and page.stem not in {*ONE_WAY, "first_lora"}]
# files of other programs and releases, which no command of a page reads
OTHER_PROGRAM_FILES = {
    *("krea2_raw_bf16.safetensors", "hunyuanimage2.1_bf16.safetensors"),
    *("model_index.json", "tokenizer.json", "config.json"),
    *("ltx-2.3-22b-distilled-1.1.safetensors", "my.safetensors"),
}
OF_THE_GUIDES = {"image_dir", "conditioning_data_dir"}  # keys of folders
NO_PATH = {*WRITTEN, "--prompt", "--api_base", "--public_url"}  # options
FILES = [file for component in known_components().values() for file in component.files]
RELEASED = {path for file in FILES for path in (file.name, file.file, Path(file.file).name)}


class Walk:
    """A reader's folder: empty files stand for those that the page and its commands have made so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wrong: list[str] = []
        self.learned: set[str] = set()  # folders of data
        self.announced: list[str] = []  # named since the last block, and not there yet

    def exists(self, path: str) -> bool:
        """Return whether there is such a file or folder; a name without folders may be in any of them."""
        return (self.folder / path).exists() or ("/" not in path and any(self.folder.rglob(path)))

    def follow(self, page: str, left_out: str = "", names_files: bool = True, is_typed: bool = True) -> None:
        """Go through a page, after those whose files it says that it uses.

        left_out: a heading. names_files: whether paths in sentences have to exist. is_typed: whether scripts
        read the options; else the page only makes its files.
        """
        text = page_of(page).read_text(encoding="utf-8")
        assert not left_out or left_out in text.splitlines()
        for source in sources_of(text):
            self.follow(source, names_files=False, is_typed=False)
        for step in read_page(text, left_out):
            match step:
                case Brought():
                    self.write(step.path)
                case Shown():
                    self.show(step)
                case Named() if names_files:
                    self.name(step.path)
                case Command():
                    self.type(step, is_typed)
                case EndOfBlock():
                    self.end_block()
        self.end_block()

    def write(self, path: str, text: str = "") -> None:
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix:
            place.write_text(text, encoding="utf-8")
        else:
            place.mkdir(exist_ok=True)

    def show(self, shown: Shown) -> None:
        if shown.path.endswith(".toml"):
            self.learned |= {*_paths_of(shown)}
        missing = [path for path in _paths_of(shown) if not self.exists(path)]
        self.wrong += [f"{shown.path} has {path}, which nothing before it makes" for path in missing]
        self.write(shown.path, shown.text)

    def name(self, path: str) -> None:
        is_of_others = path in RELEASED | OTHER_PROGRAM_FILES and not path.startswith("models/")
        if not (self.exists(path) or (ROOT / path).exists() or is_of_others):
            self.announced.append(path)

    def end_block(self) -> None:
        missing = [path for path in self.announced if not self.exists(path)]
        self.wrong += [f"{path} is named, but no block before or after it makes it" for path in missing]
        self.announced = []

    def type(self, command: Command, is_typed: bool) -> None:
        missing = [path for path in _read_by(command, self.folder) if not any(self.folder.glob(path))]
        line = shlex.join(command.words)
        outputs = {command.value(option) for option in ("--save_path", "--outdir", "--output_dir")}
        self.wrong += [f"{path} is learned, and written to by: {line}" for path in outputs & self.learned]
        self.wrong += [f"{path} does not exist yet for: {line}" for path in missing]
        if is_typed and not missing:
            _take(command, self.folder)
        for path in [*outputs_of(command, self.folder), *_saved_on_the_way(command)]:
            self.write(path, _content(path, command))


def _paths_of(shown: Shown) -> Iterator[str]:
    """Yield the paths that a shown file has and that have to exist."""
    if shown.path.endswith(".toml"):
        for table in tomllib.loads(shown.text).get("datasets", ()):
            tables = [table, *table.get("subsets", ())]
            for keys in tables:
                names = [key for key in keys if key.endswith("_directory") and key != "cache_directory"]
                yield from (keys[key] for key in (*names, *(OF_THE_GUIDES & keys.keys())))
    else:
        yield from (path for word in shown.text.split() for path in paths_in(word))


def _read_by(command: Command, folder: Path) -> Iterator[str]:
    """Yield the paths among a command's words, except those that it writes to."""
    written = outputs_of(command, folder)
    for before, word in zip(command.words, command.words[1:], strict=False):
        path = word.partition(";")[0].removeprefix("model=")  # a file and its strength
        is_path = "/" in path or any(True for _ in paths_in(path))
        if is_path and path != command.script and before not in NO_PATH and path not in written:
            yield path


def _take(command: Command, folder: Path) -> None:
    """Let the script take the command's options, in the folder where its files are, and end there."""
    if not command.script:  # `python -m`
        return
    script, words = command.script, command.arguments
    if script == "reelsmith.py":
        script, words = _script_behind(words)
    if script == RAY:  # the script that it starts
        place = next(place for place, word in enumerate(words) if word.endswith(".py"))
        script, words = words[place], words[place + 1 :]
    if "--help" in words:
        return
    # these read the model with the options
    if script not in READERS or script.startswith(("blissful_tuner/", "tools/")):
        parser = script_parser(script)
        words = words[: words.index("--then")] if "--then" in words else words  # behind it: another tool's
        _ = parser.parse_known_args(words) if script in PASSES_ON else parser.parse_args(words)
        return
    with ending_where_work_begins():
        try:
            code, messages = run_here(script, *words, folder=folder)
        except WasReadError:
            return
    pytest.fail(f"{shlex.join(command.words)} ends with {code}: {messages}")


def _saved_on_the_way(command: Command) -> Iterator[str]:
    """Yield the first file that a training saves before its end."""
    if "--save_every_n_steps" in command.words:
        name = f"{command.value('--output_dir')}/{command.value('--output_name')}"
        yield f"{name}-step{int(command.value('--save_every_n_steps')):08}.safetensors"


def _script_behind(words: list[str]) -> tuple[str, list[str]]:
    """Return the script that words of `reelsmith` name, and its own words."""
    for command in find_commands(ROOT):
        if tuple(words[: len(command.words)]) == command.words:
            return command.path.relative_to(ROOT).as_posix(), words[len(command.words) :]
    return "", ["--help"] if words == ["--help"] else pytest.fail(f"reelsmith has no {words}")


def _content(path: str, command: Command) -> str:
    """Return what later commands of a page read of a file that a command has written."""
    if path.endswith("run.toml"):
        name = command.value("--output_name", Path(path).parent.name)
        return f'[training]\noutput_dir = "output"\noutput_name = "{name}"\n'
    if path.endswith("dataset.toml"):
        return '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\n'
    return ""


def page_of(name: str) -> Path:
    """Return the file of a page; README is the project's."""
    return next(path for path in PAGES if path.stem == name)


@pytest.mark.parametrize(("page", "left_out"), WALKS.values(), ids=WALKS)
def test_a_page_can_be_followed_from_the_first_line_to_the_last(
    page: str, left_out: str, tmp_path: Path
) -> None:
    walk = Walk(tmp_path)
    if page == "README":  # its reader types in the checkout
        shutil.copytree(ROOT / "pocket", tmp_path / "pocket", ignore=shutil.ignore_patterns("*.py"))

    walk.follow(page, left_out)

    assert not walk.wrong, "\n".join(walk.wrong)


@pytest.mark.parametrize("page", OTHERS)
def test_the_commands_of_a_page_have_the_files_that_it_shows_or_says_where_to_get(
    page: str, tmp_path: Path
) -> None:
    walk = Walk(tmp_path)

    walk.follow(page, names_files=False)

    assert not walk.wrong, "\n".join(walk.wrong)
