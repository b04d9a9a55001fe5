"""Download all that a task needs, and say which commands use it."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from downloads.catalogue import ModelSet, ReleasedFile
from downloads.fetching import download_file, find_damage, partial_path
from downloads.hubs import RemoteFile, find_file
from downloads.listing import describe_licences, gigabytes, print_lines
from downloads.options import DownloadOptions
from modules.atomic_write import make_folder
from modules.errors import DownloadError, OutputError

logger = logging.getLogger(__name__)

SPARE_BYTES = 1 << 30  # left free on the disk


def run_download(options: DownloadOptions) -> None:
    """Download the files of a task and print its commands.

    Raises DownloadError if a site does not give a file, OutputError if it cannot be stored.
    """
    [chosen] = options.sets()
    files = [file for component in chosen.components for file in component.files]
    planned = [one for one in (_plan(file, options) for file in files) if one is not None]
    _check_space(planned, options.to)
    print_lines(describe_licences(chosen))  # before anything is downloaded
    for remote, target in planned:
        logger.info("%s (%s) from %s", target, gigabytes(remote.size_bytes), remote.page)
        try:
            download_file(remote, target)
        except OSError as error:
            raise OutputError(
                f"{target} cannot be written: {error.strerror or error}. Choose another --to."
            ) from error
    _report(chosen, options)


def _plan(file: ReleasedFile, options: DownloadOptions) -> tuple[RemoteFile, Path] | None:
    """Return where a file is and where it goes to, or None if it is there and complete."""
    target = options.to / file.name
    if not target.parent.resolve().is_relative_to(options.to.resolve()):
        raise OutputError(
            f"{target.parent} is a link to another place than {options.to}. Download to a folder of its own "
            "with --to, and move the files."
        )
    if target.is_dir():
        raise OutputError(f"{target}: there is a folder of that name. Move it away, or choose another --to.")
    is_there = target.is_file()
    if is_there and not options.verify and file.size_bytes == target.stat().st_size:
        logger.info("%s is there and complete", target)
        return None
    remote = find_file(file, options.source)
    if not options.accept_changed:
        remote = _compare(file, remote)
    if not is_there:
        return remote, target
    damage = find_damage(target, remote if options.verify else replace(remote, sha256=None, git_sha1=None))
    if damage is not None:
        raise OutputError(
            f"{target} exists and is another file, or damaged: {damage}.\n  Move it away and run again, or "
            "choose another --to."
        )
    logger.info("%s is there and complete%s", target, ", SHA-256 compared" if options.verify else "")
    return None


def _compare(file: ReleasedFile, remote: RemoteFile) -> RemoteFile:
    """Return `remote` with the known facts of the file. Raises DownloadError if the site has another file."""
    is_other = file.size_bytes not in (None, remote.size_bytes) or (
        file.sha256 is not None and remote.sha256 not in (None, file.sha256)
    )
    if is_other:
        raise DownloadError(
            f"{remote.page} has another {file.file} than the one known to this program (size or SHA-256).\n"
            "  If the page says that it was replaced, add --accept_changed."
        )
    return replace(remote, sha256=file.sha256 or remote.sha256)


def _check_space(planned: list[tuple[RemoteFile, Path]], folder: Path) -> None:
    """Raise OutputError if the disk of `folder` has no room for the missing files."""
    if not planned:
        return
    parts = [partial_path(*one) for one in planned]
    missing = sum(remote.size_bytes for remote, _ in planned)
    missing -= sum(part.stat().st_size for part in parts if part.exists())
    make_folder(folder, "--to")
    free = shutil.disk_usage(folder).free
    if free < missing + SPARE_BYTES:
        raise OutputError(
            f"--to {folder}: {gigabytes(missing)} are to be downloaded and {gigabytes(free)} are free. Free "
            "some space, or choose a folder on another disk."
        )


def _report(model_set: ModelSet, options: DownloadOptions) -> None:
    tokens = [file.name for one in model_set.components for file in one.files]
    logger.info("%d files are complete in %s", len(tokens), options.to)
    lines = ["", "These commands use the files:"]
    for command in model_set.typed_commands(options.to):
        lines += ["", command]
    print_lines(lines)
