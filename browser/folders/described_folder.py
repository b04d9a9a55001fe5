"""Read and edit the files that `new` writes into a folder; comments and unknown keys are preserved.

run.toml, dataset.toml and prompts.txt define a training run; such a folder is called described. Pages store
nothing elsewhere, so a terminal and several pages may edit the files in turn.
"""

import contextlib
import errno
import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Table

from browser.core.short_names import short_digest
from browser.folders.captions import BOM, compute_checksum
from modules.atomic_write import write_bytes
from modules.file_locks import only_one
from modules.pages.language import join, say, say_count
from modules.paths import is_on_foreign_share
from modules.text_files import parse_toml, read_content, real_path
from project.kinds.composing import find_run_kind
from project.kinds.whole_model import derive_intervals, saves_models
from project.options import RUN_FILE, find_models
from training.config_options import PROJECT_TABLE, toml_value

DATASET_FILE = "dataset.toml"
PROMPTS_FILE = "prompts.txt"
FILES = (DATASET_FILE, PROMPTS_FILE, RUN_FILE)  # in the order that `new` writes them
TRAINING_TABLE = "training"  # table of RUN_FILE


_WRITING = threading.Lock()  # held while a file's checksum is compared and the file is written


class ChangedMeanwhileError(Exception):
    """Raised if a file has changed since the browser loaded the page that edits it."""


@dataclass(frozen=True)
class DescribedFolder:
    """Values of a folder's run.toml and dataset.toml that the New page's form shows."""

    folder: Path
    family: str
    task: str
    train: str  # name of the kind of run
    name: str
    steps: int | None  # None: run.toml sets epochs instead
    trigger: str
    model_files: Mapping[str, str]  # path of each file of the model by its option
    values: Mapping[str, Any]  # all training options in run.toml
    checksum: str  # checksum of the folder's files
    run_content: bytes  # content of run.toml

    @property
    def commands(self) -> list[list[str]]:
        """Commands of the run, in order, each as a list of arguments."""
        return list_commands(self.run_content)

    @property
    def output(self) -> Path:
        """Folder into which the training run saves its files."""
        return self.folder / str(self.values.get("output_dir", "output"))


@dataclass(frozen=True)
class KeyChanges:
    """Changes to the options in a run.toml, and options that keep a value that the user has typed."""

    new_values: Mapping[str, Any]  # by option; None removes the option
    user_values: Mapping[str, Any] = field(default_factory=dict)  # typed values that stay

    @property
    def text(self) -> str:
        """The changed lines, such as `run.toml: max_train_steps = 100`, and the lines that are kept."""
        lines = []
        for name, value in self.new_values.items():
            is_removed = value is None
            lines.append(
                say("%(name)s is removed", name=name) if is_removed else f"{name} = {toml_value(value)}"
            )
        changes_text = join(": ", (RUN_FILE, join(", ", lines)))
        user_lines = [f"{name} = {toml_value(value)}" for name, value in self.user_values.items()]
        if not user_lines:
            return changes_text
        return say_count(
            len(user_lines),
            "%(written)s. %(kept)s stays: it was typed by hand",
            "%(written)s. %(kept)s stay: they were typed by hand",
            written=changes_text,
            kept=", ".join(user_lines),
        )


def change_steps(values: Mapping[str, Any], steps: int) -> KeyChanges:
    """Return the changes to a run.toml for another number of steps, including values derived from it.

    A value that differs from what `new` derives from the current steps was set by the user, and is kept.
    `values` are the training options in run.toml.
    """
    changes: dict[str, Any] = {"max_train_steps": steps}
    if "max_train_epochs" in values:
        changes["max_train_epochs"] = None  # it would take precedence
    old_steps = values.get("max_train_steps")
    saves_full_models = saves_models(values)
    # intervals such as save_every_n_steps, as `new` derives them from a number of steps
    new_intervals = derive_intervals(steps, saves_full_models)
    old_intervals = {}
    if isinstance(old_steps, int) and old_steps > 0:
        old_intervals = derive_intervals(old_steps, saves_full_models)
    user_values = {}
    for name, new_value in new_intervals.items():
        if name not in values or values[name] == new_value:
            continue
        was_derived = values[name] == old_intervals.get(name)
        if was_derived:
            changes[name] = new_value
        else:
            user_values[name] = values[name]
    return KeyChanges(changes, user_values)


def is_described(folder: Path) -> bool:
    """Return whether a folder has a run.toml."""
    return (folder / RUN_FILE).is_file()


def read_own_file(path: Path) -> bytes:
    """Return the bytes of a folder's run.toml, dataset.toml or prompts.txt.

    Raises:
        OSError: If the file cannot be read, or is a link that leads out of the folder. With a link, a folder
            from somebody else could make this program show and change any file.
    """
    if not real_path(path).is_relative_to(real_path(path.parent)):
        raise OSError(errno.EINVAL, say("it is a link that leads out of its folder"), str(path))
    return read_content(path)


def mark_files(folder: Path) -> str:
    """Return a checksum of a folder's run.toml, dataset.toml and prompts.txt; "" if it has none of them."""
    return _compute_checksum(_read_own_files(folder))


def _read_own_files(folder: Path) -> dict[str, bytes | OSError]:
    """Return the bytes of run.toml, dataset.toml and prompts.txt by name, or the error of reading one."""
    contents: dict[str, bytes | OSError] = {}
    for name in FILES:
        try:
            contents[name] = read_own_file(folder / name)
        except OSError as error:
            contents[name] = error
    return contents


def _compute_checksum(contents: Mapping[str, bytes | OSError]) -> str:
    checksums = []
    for content in contents.values():
        if isinstance(content, bytes):
            checksums.append(compute_checksum(content))
        else:  # the file is missing or may not be read
            checksums.append("" if isinstance(content, FileNotFoundError) else "-")
    return short_digest("".join(checksums)) if any(checksums) else ""


def read_described(folder: Path) -> DescribedFolder:
    """Read a folder's run.toml and dataset.toml, each once.

    Raises:
        OSError: If run.toml cannot be read.
        ValueError: If a file is not in the format that `new` writes.
    """
    contents = _read_own_files(folder)
    run_content = contents[RUN_FILE]
    if isinstance(run_content, OSError):  # the error takes the place of the content
        raise run_content
    run = parse_toml(run_content.decode())
    try:
        values = dict(run[TRAINING_TABLE])
        commands = [list(map(str, argv)) for argv in run[PROJECT_TABLE]["commands"]]
        download_argv = commands[0]  # `new` writes the download of the model as the first command
        family = download_argv[download_argv.index("--family") + 1]
        task = download_argv[download_argv.index("--task") + 1]
        model_paths = [str(path) for path in run[PROJECT_TABLE]["files"]]
        for path in model_paths:
            reject_share(path, folder)
        steps = None
        if "max_train_epochs" not in values:  # epochs take precedence over steps
            steps = values.get("max_train_steps")
        return DescribedFolder(
            folder=folder,
            family=family,
            task=task,
            train=find_run_kind(commands).name,
            name=str(values["output_name"]),
            steps=None if steps is None else int(steps),
            trigger=_read_trigger(contents[DATASET_FILE]),
            model_files=_name_model_files(family, task, model_paths),
            values=values,
            checksum=_compute_checksum(contents),
            run_content=run_content,
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / RUN_FILE} is not as `new` writes it: {error}") from None


def reject_share(text: str, folder: Path) -> None:
    """Raise ValueError if a path that a file in the folder names is on another machine's network share."""
    if is_on_foreign_share(folder / text, folder):
        raise ValueError(f"{text} is on another machine, which pages do not look at")


def _read_trigger(content: bytes | OSError) -> str:
    """Return the trigger word in a dataset.toml; "" if there is no such file."""
    if isinstance(content, FileNotFoundError):
        return ""
    if isinstance(content, OSError):
        raise content
    general = parse_toml(content.decode()).get("general", {})
    return str(general.get("trigger_word", "")) if isinstance(general, dict) else ""


def _name_model_files(family: str, task: str, paths: list[str]) -> dict[str, str]:
    """Return a model's files by option name, such as `vae`; `paths` are in the catalogue's order."""
    for model in find_models():
        if (model.family, model.task) == (family, task):
            parts = [part for part in model.components if part.option]
            if len(paths) < len(parts):  # a checkpoint contains several parts
                parts = [part for part in parts if part.inside is None]
            names = dict.fromkeys((part.option or "").lstrip("-") for part in parts)
            return dict(zip(names, paths, strict=False))
    return {}


def read_commands(folder: Path) -> list[list[str]]:
    """Return the commands in a folder's run.toml; [] if `new` did not write them there."""
    try:
        return list_commands(read_content(folder / RUN_FILE))
    except OSError:
        return []


def list_commands(run_content: bytes) -> list[list[str]]:
    """Return the commands in the bytes of a run.toml; [] if `new` did not write them there."""
    try:
        return [list(words) for words in _parse_commands(run_content)]
    except (ValueError, KeyError, TypeError):
        return []


@functools.lru_cache(maxsize=8)  # an open page polls it
def _parse_commands(content: bytes) -> tuple[tuple[str, ...], ...]:
    run = parse_toml(content.decode())
    return tuple(tuple(str(word) for word in words) for words in run[PROJECT_TABLE]["commands"])


def keep_copies(folder: Path, target: Path) -> None:
    """Copy run.toml, dataset.toml and prompts.txt of a folder to `target`. Raises OutputError on failure."""
    for name in FILES:
        with contextlib.suppress(FileNotFoundError):
            content = read_content(folder / name)
            write_bytes(target / name, content)


@dataclass(frozen=True)
class TextForm:
    """The text of a file as a page edits it, and the byte order mark and line ends of the file."""

    text: str
    start: bytes = b""
    newline: str = "\n"

    @classmethod
    def of(cls, content: bytes) -> "TextForm":
        """Parse the bytes of a file. Raises UnicodeDecodeError if they are not UTF-8."""
        start = BOM if content.startswith(BOM) else b""
        decoded = content[len(start) :].decode()
        return cls(tidy_lines(decoded), start, newline="\r\n" if "\r\n" in decoded else "\n")

    def with_text(self, text: str) -> bytes:
        """Return the bytes of the file with `text` as its text, keeping byte order mark and line endings."""
        return self.start + tidy_lines(text).replace("\n", self.newline).encode()


def tidy_lines(text: str) -> str:
    """Convert all line ends of a text to LF, as in a form's text field."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True)
class DraftFile:
    """A run.toml, dataset.toml or prompts.txt as it was read, to be edited and saved."""

    path: Path
    content: bytes | None  # None: there is no such file

    @property
    def name(self) -> str:
        """Name of the file without its folder."""
        return self.path.name

    @property
    def checksum(self) -> str:
        """Checksum of the content; "" if the file is missing."""
        return compute_checksum(self.content)

    @property
    def form(self) -> TextForm:
        """The decoded text with its byte order mark and line ends. Raises UnicodeDecodeError if not UTF-8."""
        return TextForm.of(self.content or b"")

    @property
    def text(self) -> str:
        """The text of the file, as a page edits it; "" if the file is missing."""
        return self.form.text

    def save(self, text: str) -> None:
        """Replace the file's text. Raises ChangedMeanwhileError if the file has changed since it was read."""
        content = self.form.with_text(text)
        with _WRITING, only_one(self.path.with_name(f".{self.path.name}.lock")):
            try:
                present_content: bytes | None = read_content(self.path)
            except FileNotFoundError:
                present_content = None
            if compute_checksum(present_content) != self.checksum:
                raise ChangedMeanwhileError
            if content != present_content:
                write_bytes(self.path, content)


def change_keys(path: Path, changes: Mapping[str, Any], checksum: str) -> None:
    """Set and remove training options in a run.toml, as `edit_toml` does.

    Args:
        changes: New value of each option; None removes the option.
        checksum: Checksum (`compute_checksum`) of the content to which the changes apply.

    Raises:
        ChangedMeanwhileError: If the file has other content now.
        ValueError: If the file is not TOML or has no table of training options.
        OSError: If the file cannot be read.
        OutputError: If the file cannot be written.
    """
    draft = DraftFile(path, read_own_file(path))
    if draft.checksum != checksum:
        raise ChangedMeanwhileError
    draft.save(edit_toml(draft.text, changes))


def edit_toml(text: str, changes: Mapping[str, Any]) -> str:
    """Return the text of a run.toml with changed options. All other text and comments are preserved.

    `changes` are the new values; None removes an option. A key is changed in the last table that contains it,
    because tables only group keys. A new key is added at the end of TRAINING_TABLE. Raises ValueError if the
    text is not TOML or has no table of training options.
    """
    if not changes:
        return text
    try:
        document = tomlkit.parse(text)
        training_table = document[TRAINING_TABLE]
    except TOMLKitError as error:
        raise ValueError(f"it is not TOML: {error}") from None
    if not isinstance(training_table, Table):
        raise ValueError(f"[{TRAINING_TABLE}] is not a table")
    for name, value in changes.items():
        tables = _list_tables_with(document, name)
        if value is None:
            for table in tables:
                table.remove(name)
        elif tables:
            tables[-1][name] = value
        else:
            append_key(training_table, name, value)
    return tomlkit.dumps(document)


def _list_tables_with(document: Any, name: str) -> list[Any]:
    """Return the tables of a TOML document that contain the key `name`, except the project's own table."""
    holders = []
    tables = [document]
    while tables:
        table = tables.pop(0)
        for key, value in table.items():
            if isinstance(value, dict) and key != PROJECT_TABLE:
                tables.append(value)
            elif key == name:
                holders.append(table)
    return holders


def append_key(table: Table, name: str, value: Any) -> None:
    """Add a new key at the end of a table, before its trailing blank lines and comments."""
    body = table.value.body
    tail = []
    while body and body[-1][0] is None:
        tail.append(body.pop()[1])
    table.append(name, value)
    for item in reversed(tail):
        table.value.append(None, item)
