"""The table of models on the New page (outputs, downloads, memory, licenses), and descriptions of files."""

import functools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from browser.folders.folders import MediaFolder
from browser.jobs.printed_lines import translate_file_kind, translate_line
from checkpoints.first_bytes import describe_kind as describe_beginning
from checkpoints.first_bytes import is_pointer_or_page
from checkpoints.kinds import describe_file_kind
from downloads.catalogue import Component, Licence, ModelSet
from downloads.listing import gigabytes, total_bytes
from modules.control_codes import escape_control_codes
from modules.installation import PREFIX, ROOT, program_environment
from modules.pages.language import join, say
from modules.paths import expand_path, strip_quotes
from modules.text_files import read_tensor_header
from project.model_sizes import describe_fit, is_small, needs_image, transformer_bytes
from project.options import find_models

GATED = "asks to accept"  # occurs in the terms of licenses that need acceptance
MODEL_SUFFIXES = frozenset({".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt"})
FILE_CHECK_SECONDS = 120
_FILE_CHECK_LOCK = threading.Lock()  # one process at a time, because each loads torch
logger = logging.getLogger(__name__)
MAX_SUGGESTED = 3  # number of recommended rows
USUAL_PIXELS = 1024 * 1024  # of the images of models since Stable Diffusion XL


@dataclass(frozen=True)
class ModelRow:
    """A model of the catalogue as a row of the table of models."""

    model: ModelSet
    size: str  # GB on disk or to download
    is_there: bool
    fit: str
    makes: str
    is_suggested: bool = False

    @property
    def licences(self) -> list[str]:
        """Return the distinct names of the licenses of its parts."""
        return [licence.name for licence in list_licenses(self.model.components)]

    @property
    def value(self) -> str:
        """Value of the form field that selects the model."""
        return f"{self.model.family} {self.model.task}"


def describe_kind(model: ModelSet) -> str:
    """Return what a model generates according to the catalogue, such as `clips and sound`."""
    if "--output_layers" in model.commands["generate"]:
        return say("layers")
    if needs_image(model):
        return say("edits")
    if model.properties["frames"] == 1:
        return say("images and edits") if "edits" in model.about else say("images")
    may_have_audio = model.properties.get("sound_alone") and "without audio" not in model.about
    has_audio = may_have_audio or "with audio" in model.about
    return say("clips and sound") if has_audio else say("clips")


def list_missing(model: ModelSet, models: Path, files: Mapping[str, str]) -> list[Component]:
    """Return the parts of a model that are missing in the folder `models`.

    `files` are the user's own files by option; the parts that they replace are not downloaded.
    """
    missing = []
    for part in model.components:
        option = (part.option or "").lstrip("-")
        if option and option not in files and not (models / part.path).exists():
            missing.append(part)
    return missing


def list_model_rows(models: Path, memory: float, content: MediaFolder | None = None) -> list[ModelRow]:
    """Return table rows of all models that a folder can train.

    The models that suit the folder best come first, then other models that suit it, then the rest. The
    second and third group are sorted by title.

    Args:
        memory: GiB of the graphics card; 0 without a card.
        content: Media of the folder; None if no folder is selected.
    """
    ranked_rows = [_rank_row(_make_row(model, models, memory), memory, content) for model in find_models()]
    # False sorts first; the sort is stable: models of equal rank stay in the order of the catalogue
    ranked_rows.sort(
        key=lambda ranked: (
            not ranked.suits_media,
            ranked.is_distilled,
            ranked.is_for_drawings,
            not ranked.fits_memory,
            ranked.is_small_image,
            ranked.size_bytes,
        )
    )
    num_suggested = 0 if content is None else MAX_SUGGESTED
    suggested = [replace(ranked.row, is_suggested=True) for ranked in ranked_rows[:num_suggested]]
    other_rows = sorted(
        ranked_rows[num_suggested:],
        key=lambda ranked: (not ranked.suits_media, ranked.row.model.title.lower()),
    )
    return [*suggested, *(ranked.row for ranked in other_rows)]


def _make_row(model: ModelSet, models: Path, memory: float) -> ModelRow:
    """Return the table row of a model, with the size of its files that are missing in `models`."""
    missing = list_missing(model, models, {})
    size = say("ready")
    if missing:
        size = say("%(total_bytes)s to download", total_bytes=gigabytes(total_bytes(missing)))
    return ModelRow(
        model=model,
        size=size,
        is_there=not missing,
        fit=describe_fit(model, memory),
        makes=describe_kind(model),
    )


class _RankedRow(NamedTuple):
    """A table row of a model, with its sort keys."""

    row: ModelRow
    suits_media: bool  # the model generates the kind of media that is in the folder
    is_distilled: bool  # distilled models are harder to train
    is_for_drawings: bool  # a folder of images rather has photos
    fits_memory: bool  # whether it fits the memory of the graphics card
    is_small_image: bool  # a card could train a newer model, which makes larger images
    size_bytes: int


def _rank_row(row: ModelRow, memory: float, content: MediaFolder | None) -> _RankedRow:
    """Return a row of the model table with its sort keys."""
    # `memory` is the GPU's memory in GiB, 0 without a GPU; `content` counts the selected folder's media.
    model = row.model
    suits_media = True
    if content is not None:
        suits_media = row.makes.startswith("clips" if content.num_clips else "images")
        if content.num_clips and model.properties.get("from_image"):
            suits_media = False  # it needs start images
    height, width = model.properties["resolution"]
    return _RankedRow(
        row=row,
        suits_media=suits_media,
        # the catalogue only describes this in words
        is_distilled=any(phrase in model.about for phrase in ("eight steps", "four steps", "distilled")),
        is_for_drawings="for drawings" in model.about,
        fits_memory=not memory or is_small(model, memory),
        is_small_image=memory > 0 and row.makes.startswith("images") and height * width < USUAL_PIXELS,
        size_bytes=transformer_bytes(model),
    )


def list_licenses(parts: Sequence[Component]) -> list[Licence]:
    """Return the distinct licenses of the model parts to download."""
    return list(dict.fromkeys(part.licence for part in parts))


def is_gated(licence: Licence) -> bool:
    """Return whether the license must be accepted on the repository's page, which requires a login."""
    return GATED in licence.terms


def has_login() -> bool:
    """Return whether this machine has a Hugging Face token. The token is neither shown nor verified."""
    from huggingface_hub import get_token  # only for models that need it

    return bool(os.environ.get("HF_TOKEN") or get_token())


def describe_file(text: str) -> str:
    """Describe the model file at a typed path from its header, such as `the transformer of Wan2.1, 2.8 GB`.

    Returns the reason if the path is not a model file, and "" if nothing is typed.
    """
    if not text.strip() or "\0" in text:  # no path contains a null character
        return ""
    try:
        path = expand_path(strip_quotes(text.strip()))
    except ValueError as error:
        reason = str(error)
        return f"{reason[:1].upper()}{reason[1:]}."
    if not path.is_absolute():
        return say("Enter an absolute path, which begins at the root or at a drive.")
    try:
        description = _describe_without_header(path)
        if description:
            return description
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            wrong_beginning = _describe_wrong_beginning(file.read(16))
            if wrong_beginning:
                return wrong_beginning
            file.seek(0)
            header = read_tensor_header(file.read, size_bytes)
    except (OSError, ValueError) as error:
        return say("It cannot be read: %(error)s. Download or copy it again.", error=error)
    required_bytes = header.start + _find_data_end(header.entries)
    if required_bytes > size_bytes:
        return say(
            "It is incomplete: it has %(size_bytes)s of %(end)s bytes. Download or copy it again.",
            size_bytes=f"{size_bytes:,}",
            end=f"{required_bytes:,}",
        )
    return say(
        "%(kind)s, %(size_bytes)s",
        kind=translate_file_kind(describe_file_kind(header.entries)),
        size_bytes=gigabytes(size_bytes),
    )


def _describe_without_header(path: Path) -> str:
    """Describe a folder, a missing file, or a file in a format without a header to read; "" for others."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return say("a folder; Prepare looks into it")
    if suffix not in MODEL_SUFFIXES:
        return say(
            "This is not a model file: their names end in %(names)s.",
            names=join(", ", sorted(MODEL_SUFFIXES)),
        )
    if not path.is_file():
        return say("There is no such file.")
    if suffix != ".safetensors":  # only safetensors files have a header that is read here
        size = gigabytes(path.stat().st_size)
        return say("%(size_bytes)s; Prepare finds out what it is", size_bytes=size)
    return ""


def _describe_wrong_beginning(first_bytes: bytes) -> str:
    """Describe a file that is empty, or a Git LFS pointer or HTML page instead of a model; "" for others."""
    if not first_bytes:
        return say("It is empty. Download or copy it again.")
    return translate_line(f"It {describe_beginning(first_bytes)}") if is_pointer_or_page(first_bytes) else ""


def find_misfit(family: str, task: str, option: str, text: str) -> str:
    """Return the error message of `new` if a file does not fit a model's option; "" if it fits.

    Returns "" as well if `describe_file` rejects the file, or if the check takes too long. `text` is the
    typed path.
    """
    try:
        path = expand_path(strip_quotes(text.strip()))
        if not path.is_absolute() or not path.is_file() or path.suffix.lower() not in MODEL_SUFFIXES:
            return ""
        status = path.stat()
        with _FILE_CHECK_LOCK:
            return _check_file_in_process(
                family, task, option=option, path=str(path), changed=status.st_mtime_ns, size=status.st_size
            )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        logger.debug("%s", text, exc_info=error)
        return ""


@functools.lru_cache(maxsize=256)
def _check_file_in_process(family: str, task: str, option: str, path: str, changed: int, size: int) -> str:
    """Return why a model file does not fit an option of a task; "" if it fits or cannot be checked."""
    # It is checked in another process, because the families' code loads torch. `changed` (modification time)
    # and `size` are only part of the cache key, so that a changed file is checked again.
    process = subprocess.run(
        [sys.executable, "-m", f"{PREFIX}project.file_check", family, task, option, path],
        cwd=ROOT,
        env=program_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=FILE_CHECK_SECONDS,
    )
    if process.returncode == 1 and process.stdout:
        text = escape_control_codes(process.stdout)
        return join("\n", [translate_line(line.strip()) for line in text.splitlines()])
    return ""


def _find_data_end(entries: Mapping[str, Any]) -> int:
    """Return where the last tensor in a safetensors header ends, as an offset from the first data byte."""
    try:
        return max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (TypeError, LookupError, ValueError, OverflowError):
        raise ValueError("its header does not say where its tensors are") from None
