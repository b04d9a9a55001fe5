"""Pack a described folder into one file: media, captions, caches and settings, without local paths.

The file is a zip archive with uncompressed members, so the unpacked folder is never larger than the file.
"""

import json
import os
import stat
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from checkpoints.opening import SUFFIXES
from dataset.cache.commands import NAME
from downloads.listing import print_lines
from modules.atomic_write import atomic_path
from modules.bars import BYTES, Bar
from modules.command import name_extensions, quote_for_shell
from modules.console import format_count, format_size, list_some
from modules.control_codes import escape_control_codes
from modules.errors import OptionError, OutputError
from modules.installation import FRONT_SCRIPT, PREFIX, command_words
from modules.limits import MAX_METADATA_BYTES
from modules.options import Options, option
from modules.output_files import check_place, find_error_on_windows
from modules.paths import expand_path
from modules.text_files import parse_toml, read_text, real_path
from project.media import CHECK_PAGE
from project.options import RUN_FILE, as_operand, own_command
from project.relocating import (
    MachinePaths,
    RelocatedText,
    find_own_names,
    relocate_history,
    relocate_prompts,
    relocate_toml,
)
from project.run_options import TRAINING_ROWS
from training.config_options import PROJECT_TABLE

MANIFEST = "reelsmith.json"  # member of a packed file with its format and modification times
VERSION = 1
# first part of a model's path in a packed run.toml; `unpack` puts its own folder of models there
ARCHIVE_MODEL_FOLDER = "models"
MAX_NAME_BYTES = 1000  # maximum bytes of a file name

PIECE_BYTES = 1 << 20
FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # date of all members, so that equal folders give equal archives
LISTS = {".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml"}  # may contain paths of this machine


class PackOptions(Options):
    """Options of `pack`: the folder, and where to write the archive."""

    folder: Path = option(
        "folder that `new` described", positional=True, place="folder", hint="the folder that `new` described"
    )
    output: Path | None = option("file to write (default: FOLDER-pack.zip next to the folder)", flags=("-o",))
    with_state: bool = option(
        "take the newest state of the training along too, to continue it on the other machine"
    )
    overwrite: bool = option("replace the file if it exists")

    def __post_init__(self) -> None:
        if self.output is not None:
            check_place("--output", self.output)


def find_name_error(name: str, on_windows: bool) -> str:
    """Return why a file name is not allowed in an archive; "" if it is.

    `name` is the path within the folder, with forward slashes. With `on_windows`, names that only Windows
    forbids are rejected, too.
    """
    parts = PurePosixPath(name).parts
    is_shortened = name != "/".join(parts)  # by pathlib, such as a//b or ./a: `pack` would not write it
    if is_shortened or name.startswith("/") or ".." in parts or not parts:
        return "it leads out of the folder"
    if "\\" in name or escape_control_codes(name) != name or any(sign in name for sign in "\n\t\0"):
        return "it contains a backslash or control codes"
    if any(part.startswith(".") for part in parts):
        return "it is hidden"
    try:
        num_bytes = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "it is not UTF-8"
    if num_bytes > MAX_NAME_BYTES:
        return f"it has {num_bytes} bytes, and at most {MAX_NAME_BYTES} are allowed"
    errors_on_windows = map(find_error_on_windows, parts if on_windows else ())
    return next(filter(None, errors_on_windows), "")


@dataclass(frozen=True)
class PackSource:
    """The settings in a folder's run.toml that packing needs."""

    folder: Path
    output: Path
    name: str  # name of the LoRA
    excluded_paths: frozenset[Path]  # files and folders that are not packed
    machine_paths: MachinePaths
    own_models: tuple[str, ...]  # undownloadable model files, as packed paths
    prompts: Path | None


@dataclass(frozen=True)
class PackMember:
    """A file to pack, with its name in the archive; `content`, if set, is packed instead of the file's."""

    name: str
    path: Path
    content: bytes | None = None  # replaces the content of `path`

    @property
    def size_bytes(self) -> int:
        """Size in bytes of what is packed: `content` if it is set, otherwise the file."""
        return self.path.stat().st_size if self.content is None else len(self.content)


def pack_folder(options: PackOptions) -> None:
    """Pack a training folder into a zip archive for another machine; print what it contains and omits.

    Raises:
        OptionError: If the folder is not described, or if its files name paths outside of it.
        OutputError: If the file exists or cannot be written.
    """
    output = _select_output(options)
    pack_source = read_pack_source(options.folder)  # what run.toml says: prompts, model files, what to omit
    folder_members = _list_folder_members(pack_source)
    members = folder_members.members
    if options.with_state:
        members += _list_state_members(pack_source)
    members, secrets = _relocate_texts(pack_source, members)
    members.sort(key=lambda member: member.name)
    _write_archive(output, real_path(options.folder).name, members)

    size = format_size(sum(member.size_bytes for member in members))
    # typed in a folder of that machine, where a checkout may be elsewhere
    unpack_words = name_extensions(["python", FRONT_SCRIPT, "unpack", output.name])
    if PREFIX:
        unpack_words = command_words(unpack_words)
    # Lines about the files, the options of run.toml and the models that the archive omits.
    skipped_paths = folder_members.skipped_paths
    own_models = pack_source.own_models
    lines = []
    if skipped_paths:
        lines.append(f"left out, because they are hidden or not files: {list_some(skipped_paths)}")
    if secrets:
        lines.append(f"left out of {RUN_FILE}, because they are secret: {list_some(secrets)}")
    if own_models:
        names = list_some(own_models)
        lines.append(f"Copy these models too, because the other machine cannot download them: {names}")
    remarks = [
        f"{output}: {format_count(len(members), 'file')}, {size}",
        *lines,
        f"On the other machine: {quote_for_shell(unpack_words)}",
    ]
    print_lines(remarks)


def _select_output(options: PackOptions) -> Path:
    """Return the path of the archive: --output, or FOLDER-pack.zip next to the folder."""
    folder = real_path(options.folder)
    output = options.output or folder.with_name(f"{folder.name}-pack.zip")
    if real_path(output).is_relative_to(folder):
        raise OptionError(f"--output {output} lies in the folder that it packs. Pass a place outside of it")
    if output.exists() and not options.overwrite:
        raise OutputError(f"{output} already exists. Pass --overwrite, or another --output")
    return output


def read_pack_source(folder: Path) -> PackSource:
    """Read from run.toml what packing needs: model paths, output folder and prompts.

    Raises:
        OptionError: If the file is missing, or does not have the layout that `new` writes.
    """
    run_file = _read_run_file(folder)
    # The model file paths in the training options that are outside the project folder
    values = [value for value in run_file.training.values() if isinstance(value, str)]
    values += [
        text for value in run_file.training.values() if isinstance(value, list) for text in map(str, value)
    ]
    no_folder = MachinePaths(Path())
    models, own_models = _map_model_paths(
        folder,
        files=[
            *run_file.model_files,
            *([text for text in values if text.endswith(SUFFIXES) and no_folder.relocate(text) is None]),
        ],
        download_folder=_find_download_folder(run_file.commands),
    )
    model_paths = [expand_path(file, folder) for file in models]
    excluded_paths = [folder / CHECK_PAGE, run_file.output, run_file.logs, *model_paths]
    prompts_file = run_file.training.get("sample_prompts")
    return PackSource(
        folder=folder,
        output=run_file.output,
        name=run_file.name,
        excluded_paths=frozenset(map(real_path, excluded_paths)),
        machine_paths=MachinePaths(folder, models),
        own_models=tuple(own_models),
        prompts=expand_path(str(prompts_file), folder) if prompts_file else None,
    )


class RunFileContent(NamedTuple):
    """What packing reads from a folder's run.toml."""

    training: Mapping[str, Any]
    model_files: list[str]
    commands: list[list[str]]
    output: Path  # folder of the trained files
    logs: Path  # folder of the logs; the same as `output` if the file names none
    name: str  # name of the LoRA


def _read_run_file(folder: Path) -> RunFileContent:
    """Read a folder's run.toml."""
    path = folder / RUN_FILE
    try:
        tables = parse_toml(read_text(path))
        training: Mapping[str, Any] = tables["training"]
        project = tables[PROJECT_TABLE]
        output = expand_path(str(training["output_dir"]), folder)
        return RunFileContent(
            training=training,
            model_files=[str(file) for file in project["files"]],
            commands=[[str(word) for word in words] for words in project["commands"]],
            output=output,
            logs=expand_path(str(training["logging_dir"]), folder) if "logging_dir" in training else output,
            name=str(training["output_name"]),
        )
    except FileNotFoundError:
        words = own_command("new", as_operand(folder))
        raise OptionError(f"{path}: there is no such file. Describe the folder first: {words}") from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise OptionError(
            f"{path} is not in the form that `new` writes ({reason}). Fix it, or run `new` again"
        ) from None


def _find_download_folder(commands: Sequence[Sequence[str]]) -> str | None:
    """Return the download folder in the commands (--to), as written in run.toml; None if they have none."""
    for words in commands:
        if "--to" in words[:-1]:
            return words[words.index("--to") + 1]
    return None


def _map_model_paths(
    folder: Path, files: Sequence[str], download_folder: str | None
) -> tuple[dict[str, str], list[str]]:
    """Map paths of model files to paths in the archive; list those that cannot be downloaded again."""
    # These are the files outside of `download_folder`, which is spelled as in run.toml.
    archive_paths: dict[str, str] = {}
    not_downloaded: list[str] = []
    download_root = None
    if download_folder is not None:
        archive_paths[download_folder] = ARCHIVE_MODEL_FOLDER
        download_root = real_path(expand_path(download_folder, folder))
    for file in dict.fromkeys(files):
        path = real_path(expand_path(file, folder))
        if download_root is not None and path.is_relative_to(download_root):
            archive_paths[file] = f"{ARCHIVE_MODEL_FOLDER}/{path.relative_to(download_root).as_posix()}"
            continue
        archive_path = f"{ARCHIVE_MODEL_FOLDER}/{path.name}"
        number = 2
        while archive_path in archive_paths.values():  # a file of this name from another folder
            archive_path = f"{ARCHIVE_MODEL_FOLDER}/{number}/{path.name}"
            number += 1
        archive_paths[file] = archive_path
        not_downloaded.append(archive_path)
    return archive_paths, not_downloaded


class FolderMembers(NamedTuple):
    """The files of a folder to pack, and the paths left out (hidden and special files)."""

    members: list[PackMember]
    skipped_paths: list[str]


def _list_folder_members(pack_source: PackSource) -> FolderMembers:
    """Return the files of a folder that go into its archive; links are followed."""
    members: list[PackMember] = []
    skipped_paths: list[str] = []
    visited: set[Path] = set()
    for folder_text, folders, files in os.walk(pack_source.folder, followlinks=True):
        folder = Path(folder_text)
        # NAME is the file in which caching notes its commands, which the user does not know
        skipped_paths += [
            str(folder / name) for name in [*folders, *files] if (name.startswith(".") and name != NAME)
        ]
        # os.walk visits only the folders that stay in this list
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # links may lead to a folder that was visited already
        if real_path(folder) in visited or real_path(folder) in pack_source.excluded_paths:
            folders.clear()
            continue
        visited.add(real_path(folder))
        for path in [folder / name for name in sorted(files) if not name.startswith(".")]:
            if real_path(path) in pack_source.excluded_paths:
                continue
            if path.is_file():
                # A file as it is packed. Raises OptionError if its name is not allowed on every system.
                member = PackMember(path.relative_to(pack_source.folder).as_posix(), path)
                reason = find_name_error(member.name, on_windows=False)
                if not reason and member.name == MANIFEST:
                    reason = "`pack` uses that name itself"
                if reason:
                    raise OptionError(f"{path!r} cannot be packed: {reason}. Rename it")
                members.append(member)
            else:
                skipped_paths.append(str(path))
    return FolderMembers(members, skipped_paths)


def _list_state_members(pack_source: PackSource) -> list[PackMember]:
    """Return the files of the latest training state, and the history. Raises OptionError without a state."""
    from training.reports.history import history_path  # imports torch, which is only needed for states
    from training.saving.states import find_latest  # likewise

    state = find_latest(pack_source.output, pack_source.name)
    if state is None:
        raise OptionError(f"--with_state: {pack_source.output} has no state of {pack_source.name}. Omit it")
    folder = real_path(pack_source.folder)
    files = [path for path in sorted(state.rglob("*")) if path.is_file()]
    history = history_path(pack_source.output, pack_source.name)
    if history.is_file():
        files.append(history)
    return [PackMember(real_path(path).relative_to(folder).as_posix(), path) for path in files]


def _relocate_texts(
    pack_source: PackSource, members: Sequence[PackMember]
) -> tuple[list[PackMember], list[str]]:
    """Make the paths in the packed text files relative; also return the secret options that were removed."""
    secret_options = {name for name, row in TRAINING_ROWS.items() if row.get("is_secret")}
    relocated: list[PackMember] = []
    removed_options: list[str] = []
    outside_paths: list[str] = []
    for member in members:
        relocation = _relocate_member(pack_source, member.path, secret_options)
        removed_options += relocation.removed_options
        outside_paths += [f"{member.path}: {path}" for path in relocation.outside_paths]
        if relocation.text is not None:
            member = replace(member, content=relocation.text.encode("utf-8"))
        relocated.append(member)
    if outside_paths:
        machine_paths = "\n  ".join(outside_paths[:6])
        raise OptionError(
            f"files of the folder contain paths of this machine:\n  {machine_paths}\n"
            "Make paths inside the folder relative, move what lies elsewhere into it, and run again"
        )
    return relocated, removed_options


class _RelocatedMember(NamedTuple):
    text: str | None = None  # None: the file is packed unchanged
    outside_paths: Sequence[str] = ()  # paths of this machine that are not packed
    removed_options: Sequence[str] = ()  # secret options


def _relocate_member(pack_source: PackSource, path: Path, secret_options: set[str]) -> _RelocatedMember:
    """Make the paths in a TOML file, the prompts or the history relative."""
    # Lists of captions are not rewritten, but the result contains the paths of this machine in them.
    machine_paths = pack_source.machine_paths
    if path.suffix.lower() == ".toml":
        return _RelocatedMember(*_relocate_file(relocate_toml, machine_paths, path, secret_options))
    if pack_source.prompts is not None and real_path(path) == real_path(pack_source.prompts):
        relocated = _relocate_file(relocate_prompts, machine_paths, path)
        return _RelocatedMember(relocated.text, relocated.outside_paths)
    if path.parent == pack_source.output and path.suffix == ".jsonl":
        return _RelocatedMember(relocate_history(read_text(path, MAX_METADATA_BYTES), machine_paths))
    if path.suffix.lower() in LISTS:
        return _RelocatedMember(outside_paths=find_own_names(path, machine_paths))
    return _RelocatedMember()


def _relocate_file(
    relocate: Callable[..., RelocatedText], machine_paths: MachinePaths, path: Path, *without: set[str]
) -> RelocatedText:
    """Read a text file and return its text with relocated paths."""
    try:
        return relocate(read_text(path), machine_paths, *without)
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}. Fix it, or move it out of the folder") from None


def _write_archive(output: Path, name: str, members: Sequence[PackMember]) -> None:
    """Write a folder's archive. If OutputError is raised, no file is left behind."""
    modified = {member.name: member.path.stat().st_mtime_ns for member in members}
    manifest = {"version": VERSION, "name": name, "modified": modified}
    total = sum(member.size_bytes for member in members)
    with (
        atomic_path(output, total) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        Bar(total, "packing", BYTES) as bar,
    ):
        archive.writestr(_describe_member(MANIFEST), json.dumps(manifest, indent=1, sort_keys=True))
        for member in members:
            entry = _describe_member(member.name)
            if member.content is not None:
                archive.writestr(entry, member.content)
                bar.update(len(member.content))
                continue
            # zipfile needs the size in advance to support files over 2 GiB
            entry.file_size = member.size_bytes
            with member.path.open("rb") as source, archive.open(entry, "w") as target:
                while piece := source.read(PIECE_BYTES):
                    target.write(piece)
                    bar.update(len(piece))


def _describe_member(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, FIRST_DAY)
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    entry.create_system = 3  # Unix, on all systems: the file mode is in external_attr
    return entry
