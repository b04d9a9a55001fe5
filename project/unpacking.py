"""Restore the folder of a packed file.

The file may come from somebody else, so everything is checked before anything is written.
"""

import contextlib
import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from downloads.listing import print_lines
from modules.atomic_write import atomic_folder, check_space
from modules.bars import BYTES, Bar
from modules.console import format_count, format_size, list_some
from modules.control_codes import shorten
from modules.errors import OptionError, OutputError, UserError
from modules.limits import MAX_METADATA_BYTES
from modules.options import Options, option
from modules.output_files import fold_name
from modules.paths import expand_path, path_exists
from modules.text_files import parse_json, parse_toml, read_text, real_path, require_regular_file
from modules.zip_files import BoundedFile
from project.options import MODELS, RUN_FILE, as_operand, download_options, own_command
from project.packing import ARCHIVE_MODEL_FOLDER, MANIFEST, VERSION, find_name_error
from project.relocating import change_texts
from training.config_options import PROJECT_TABLE

PIECE_BYTES = 1 << 20
MAX_RUN_FILE_BYTES = 1 << 18  # bytes; `new` writes 5 kB, and parsing a megabyte takes seconds
ENCRYPTED = 0x1
LATEST_NS = 1 << 62  # latest time of a file: the year 2116


class UnpackOptions(Options):
    """Options of `unpack`: the archive, and the folder to unpack it into."""

    file: Path = option("file that `pack` wrote", positional=True, place="file")
    folder: Path | None = option(
        "folder to make (default: the name of the packed one, here)", positional=True, nargs="?"
    )
    models: Path = option("folder of models on this machine, which `run --download` fills", default=MODELS)


def unpack_folder(options: UnpackOptions) -> None:
    """Unpack an archive of `pack` into a new folder, and print the command that starts training.

    After an error no folder is left behind.

    Raises:
        OptionError: If the file is not a complete and safe packed folder.
        OutputError: If the folder exists or cannot be written.
    """
    path = options.file
    try:
        require_regular_file(path)
        with BoundedFile(path, "rb") as file, zipfile.ZipFile(file) as archive:
            manifest = _read_manifest(archive)
            members = [entry for entry in archive.infolist() if entry.filename != MANIFEST]
            folder = options.folder or Path(manifest["name"])
            models = _read_models(archive, real_path(options.models))
            _write_folder(archive, members, manifest["modified"], folder, options)
    except UserError:
        raise
    except (
        # a damaged archive raises many kinds of errors
        *(OSError, ValueError, KeyError, TypeError, EOFError, OverflowError),
        *(NotImplementedError, RuntimeError, struct.error, zipfile.BadZipFile),
    ) as error:
        reason = shorten(str(error), 200)
        raise OptionError(
            f"{path} is not a complete `pack` file ({reason}). Copy it again, and compare its size with that "
            "of the file on the first machine"
        ) from None
    # Lines about an unpacked folder: its size, missing models, and the next command
    # `models` are the paths that run.toml lists.
    paths = [path for path in folder.rglob("*") if path.is_file()]
    size = format_size(sum(path.stat().st_size for path in paths))
    lines = [f"{folder}: {format_count(len(paths), 'file')}, {size}"]
    missing = [file for file in models if not path_exists(expand_path(file, folder))]
    argv = ["run", as_operand(folder)]
    if missing:
        lines.append(
            f"missing models: {list_some(missing)}. `run --download` downloads those that are released; "
            "copy your own there"
        )
        argv += download_options(options.models)
    print_lines([*lines, f"Next: {own_command(*argv)}"])


def _read_manifest(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Return the manifest of a packed file after checking that all members are safe to write."""
    # checked before anything is read from the archive
    archive_bytes = os.fstat(archive.fp.fileno()).st_size  # type: ignore[union-attr]
    _check_entries(archive.infolist(), archive_bytes)
    if archive.getinfo(MANIFEST).file_size > MAX_METADATA_BYTES:
        raise ValueError(f"{MANIFEST} is too long")
    with archive.open(MANIFEST) as file:
        manifest = parse_json(_read_member(file).decode("utf-8"))
    if manifest["version"] != VERSION:
        raise ValueError(
            f"its version is {manifest['version']!r}, but this Reelsmith reads version {VERSION}"
        )
    # called only to raise KeyError if there is no run.toml
    archive.getinfo(RUN_FILE)
    name, modification_times = manifest["name"], manifest["modified"]
    # the name becomes that of the new folder
    reason = find_name_error(name, os.name == "nt")
    if reason or "/" in name:
        raise ValueError(f"its name is {name!r}: {reason or 'it leads out of the folder'}")
    if not isinstance(modification_times, dict):
        raise TypeError(f"{MANIFEST} has no table of modification times")
    return dict(manifest)


def _read_models(archive: zipfile.ZipFile, models: Path) -> list[str]:
    """Return the model files listed in an archive's run.toml, as paths in this machine's model folder."""
    if archive.getinfo(RUN_FILE).file_size > MAX_RUN_FILE_BYTES:
        raise ValueError(f"{RUN_FILE} is too long")
    with archive.open(RUN_FILE) as file:
        text = _replace_model_folder(_read_member(file).decode("utf-8-sig"), models)
    project_table = parse_toml(text).get(PROJECT_TABLE, {})
    files = project_table.get("files", []) if isinstance(project_table, dict) else None
    if not isinstance(files, list) or not all(isinstance(path, str) for path in files):
        raise TypeError(f"{RUN_FILE}: [{PROJECT_TABLE}] is not a table with a list of files")
    for path in files:
        expand_path(path)  # called only to raise ValueError for an invalid path
    return files


def _check_entries(entries: Sequence[zipfile.ZipInfo], size_bytes: int) -> None:
    """Raise ValueError for archive members with unsafe names, sizes or types."""
    # `size_bytes` is the size of the archive.
    names: set[str] = set()  # without case, which Windows and macOS ignore
    for entry in entries:
        name = entry.orig_filename
        reason = _find_entry_error(entry)
        if not reason and fold_name(name) in names:
            reason = "the archive contains it twice"
        if reason:
            raise ValueError(f"{name!r}: {reason}")
        names.add(fold_name(name))
    # no file may have the name of a folder that another file is in
    folders = {parent.as_posix() for name in names for parent in Path(name).parents}
    conflict = next(iter(names & folders), None)
    if conflict is not None:
        raise ValueError(f"{conflict!r} is a file and a folder")
    total = sum(entry.file_size for entry in entries)
    if total > size_bytes:  # members are not compressed, so they cannot be larger than the archive
        raise ValueError(
            f"its members claim {format_size(total)}, but the archive has {format_size(size_bytes)}"
        )


def _find_entry_error(entry: zipfile.ZipInfo) -> str:
    """Return why an archive member cannot be unpacked; "" if it can."""
    name_error = find_name_error(entry.orig_filename, os.name == "nt")
    if name_error:
        return name_error
    if entry.is_dir():
        return "it is a folder"
    unix_mode = entry.external_attr >> 16  # 0 if the archive was made on Windows
    if unix_mode and not stat.S_ISREG(unix_mode):
        return "it is not a regular file"
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED:
        return "it is compressed or encrypted"
    return ""


def _read_member(file: Any) -> bytes:
    pieces = []
    while piece := file.read(PIECE_BYTES):
        pieces.append(piece)
    return b"".join(pieces)


def _write_folder(
    archive: zipfile.ZipFile,
    members: Sequence[zipfile.ZipInfo],
    modification_times: Mapping[str, Any],
    folder: Path,
    options: UnpackOptions,
) -> None:
    """Write all members into a folder that appears only when it is complete."""
    # 1. Write the members into a temporary folder.
    # 2. Replace the model paths in run.toml by those of this machine.
    # 3. Set the modification times, except that of run.toml.
    # `modification_times` are in nanoseconds, by the name of the member.
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} already exists. Name another folder: unpack {options.file} FOLDER")
    total = sum(entry.file_size for entry in members)
    check_space(folder, total)
    cleanup = _without_new_parents(folder)
    with cleanup, atomic_folder(folder) as temporary, Bar(total, "unpacking", BYTES) as bar:
        for entry in members:
            # Write a member of an archive into a folder, in pieces that move the progress bar
            path = temporary / entry.filename
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, path.open("xb") as target:
                while piece := source.read(PIECE_BYTES):
                    target.write(piece)
                    bar.update(len(piece))
        run_file = temporary / RUN_FILE
        # its model paths become those of this machine's model folder
        text = _replace_model_folder(read_text(run_file, MAX_RUN_FILE_BYTES), real_path(options.models))
        run_file.write_text(text, encoding="utf-8", newline="\n")
        # run.toml was changed just now, so its old time would be wrong
        unchanged_names = [entry.filename for entry in members if entry.filename != RUN_FILE]
        for name in unchanged_names:
            nanoseconds = modification_times.get(name)
            if isinstance(nanoseconds, int) and 0 < nanoseconds < LATEST_NS:
                os.utime(temporary / name, ns=(nanoseconds, nanoseconds))


@contextlib.contextmanager
def _without_new_parents(folder: Path) -> Iterator[None]:
    """Remove newly created parent folders if the block fails."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:  # innermost first
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _replace_model_folder(text: str, models: Path) -> str:
    """Replace the archive's model folder in the text of a run.toml by this machine's model folder."""
    parse_toml(text)  # this parser limits size and nesting, which tomlkit does not
    try:
        document = tomlkit.parse(text)
    except (TOMLKitError, RecursionError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{RUN_FILE} is no TOML: {error}") from None

    # only values such as `models/vae.safetensors` are changed
    def place_model(_: str, value: str) -> str:
        first, slash, inside = value.partition("/")
        if first != ARCHIVE_MODEL_FOLDER or find_name_error(value, on_windows=False):
            return value
        return f"{models.as_posix()}{slash}{inside}"

    change_texts(document, place_model)
    return tomlkit.dumps(document)
