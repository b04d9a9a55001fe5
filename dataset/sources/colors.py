"""Find media that need a warning about how they are read: transparency, profiles, HDR, order of frames."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from dataset.sources.fetching import fetch
from dataset.sources.media_source import Fault, MediaSource, Origin, Remote
from modules.errors import MediaError
from modules.media.colors import AS_SHOWN, Colors
from modules.media.decoding import ANIMATION_SUFFIXES
from modules.media.reading import had_other_orientation, image_suffixes, media_colors, reordered_images

REORDERED = (
    "folders of frames have another order by the numbers in their names than by the names as texts; the "
    "numbers count"
)
MAX_CHECKED_FILES = 10_000  # maximum number of images and clips that are checked
CONVERTED = "have a color profile, or colors other than sRGB, and are converted to sRGB"
PALE = "are HDR, and their brightness is not converted: they look pale. Convert them to SDR first"
MOVING = "are animated: only the first frame of each is used. Tables of clips learn all of them"
TORN = "are interlaced, which is not undone: what moves is torn into lines. Deinterlace them first"
_PLAIN = Colors(is_transparent=False, is_converted=False)


def keeps_transparency(source: MediaSource, keeps_alpha: bool) -> tuple[bool, bool]:
    """Return whether an image's transparent pixels keep their colors, and whether its control images' do.

    `keeps_alpha` says whether the family uses the transparency of images (`LatentSpec.keeps_alpha`).
    """
    for_family = keeps_alpha and source.table.kind == "image"
    # with alpha_mask, transparency is the loss mask, so the colors below it are used
    return for_family or source.table.source.alpha_mask, for_family


def reading_difference(source: MediaSource, keeps_alpha: bool, decoder_version: int) -> str | None:
    """Return which of an item's files an earlier version read differently, as text; None if none.

    Files that still have to be downloaded count as equal. `keeps_alpha` says whether the model family uses
    the transparency of images. `decoder_version` is the decoder version in the cache's record.
    """
    if source.precomputed is not None or not any(
        _may_differ(path, decoder_version) for path, _ in source.latent_inputs
    ):
        return None
    if any(isinstance(origin, Remote) and not path.exists() for path, origin in source.latent_inputs):
        return None
    with fetch(source) as local:
        source_keeps, control_keeps = keeps_transparency(source, keeps_alpha)
        without_alpha = [local.mask, local.control_mask, *local.references]
        like_source = [local.rejected, *local.layers]
        # each file, and whether the colors of its transparent pixels are kept
        files = [(local.path, source_keeps)]
        files += [(path, control_keeps) for path in local.control]
        files += [(path, False) for path in without_alpha if path is not None]
        files += [(path, source_keeps) for path in like_source if path is not None]
        return _find_changed(files, decoder_version)


def find_changed_reading(
    references: Sequence[tuple[Path, Origin | None]], decoder_version: int
) -> str | None:
    """Return a text about the first reference image that is decoded differently now than when it was cached.

    Only files on disk are checked. Returns None if there is no such image.

    Args:
        references: Path of each image, and its origin if it is not a file on disk.
        decoder_version: Version of the decoder that the cache records; 0 in caches without one.
    """
    return _find_changed([(path, False) for path, origin in references if origin is None], decoder_version)


def has_codes(path: Path) -> bool:
    """Return whether a file's header must be read to know how the file is displayed.

    Clips, AVIFs and folders (by their names) may declare color codes, non-square pixels, or the order or
    orientation of their frames.
    """
    suffix = path.suffix.lower()
    return suffix == ".avif" or suffix not in image_suffixes()


def _may_differ(path: Path, decoder_version: int) -> bool:
    """Return whether another decoder version may have decoded a file differently, without opening it."""
    return decoder_version == 0 or (decoder_version < AS_SHOWN and has_codes(path))


def _find_changed(keeps_by_file: Sequence[tuple[Path, bool]], decoder_version: int) -> str | None:
    """Return the first file that an earlier version decoded differently, as text; None if there is none."""
    # keeps_by_file: Path of each file, and whether the colors of its transparent pixels are used.
    for path, keeps_transparent in keeps_by_file:
        difference = None
        if _may_differ(path, decoder_version):
            with contextlib.suppress(MediaError, OSError):  # decoding reports errors
                difference = _find_difference(path, keeps_transparent, decoder_version)
        if difference is not None:
            return f"{path.name} was read {difference}"
    return None


def _find_difference(path: Path, keeps_transparent: bool, decoder_version: int) -> str | None:
    """Return how an earlier version read a file and how it is read now, as text."""
    # None if there is no change.
    pair = reordered_images(path) if path.is_dir() else None
    if pair is not None:
        earlier, later = pair
        return f"in alphabetical order, but now is in numerical order: {earlier.name} before {later.name}"
    if had_other_orientation(path):
        return "without the mirroring that its header states, but now with it"
    if decoder_version > 1:  # since version 2, colors and pixel shapes are respected
        return None
    ignored = _formerly_ignored(media_colors(path), keeps_transparent, read_profiles=decoder_version > 0)
    return None if ignored is None else f"without {ignored}, but now with it"


def _formerly_ignored(colors: Colors, keeps_transparent: bool, read_profiles: bool) -> str | None:
    """Return which part of a file's colors an earlier version ignored, as text; None if none."""
    # keeps_transparent: Whether the colors of transparent pixels are used, instead of white.
    # read_profiles: Whether the earlier version already read color profiles and filled transparent pixels
    # with white.
    if not read_profiles and colors.is_transparent and not keeps_transparent:
        return "its transparency"
    if colors.by_codes:  # the color codes of a clip or an AVIF
        return "the color space that its header states (such as Display P3)"
    if not read_profiles and colors.is_converted:
        return "its color profile"
    if not colors.is_square:
        return "the shape of its pixels, which are not square"
    return None


def find_colors(sources: Sequence[MediaSource], keeps_alpha: bool = False) -> list[Fault]:
    """Return warnings about transparency, color profiles, HDR, interlacing and, in image tables, animation.

    At most MAX_CHECKED_FILES local files are checked. Unreadable files are reported elsewhere. `keeps_alpha`
    says whether the model family uses the transparency of images.
    """
    warnings: dict[tuple[Path, str], Fault] = {}  # by file and kind of warning
    colors_by_path: dict[Path, Colors] = {}  # several sources may share a control image
    for source in sources:
        if source.remote_or_packed or source.precomputed is not None:
            continue
        source_keeps, control_keeps = keeps_transparency(source, keeps_alpha)
        for path in (source.path, *source.control):
            if len(colors_by_path) == MAX_CHECKED_FILES and path not in colors_by_path:
                return list(warnings.values())
            try:
                colors = colors_by_path.get(path) or media_colors(path)
            except (MediaError, OSError):
                continue
            colors_by_path[path] = colors
            if colors == _PLAIN:  # nothing to warn about
                continue
            problems = _find_problems(colors, source_keeps if path is source.path else control_keeps)
            if colors.is_animated and _should_warn_of_animation(source, path):
                problems[MOVING] = ""
            for kind, detail in problems.items():
                warnings.setdefault((path, kind), Fault(kind, f"{path}{detail}", source.stem))
    return list(warnings.values())


def _should_warn_of_animation(source: MediaSource, path: Path) -> bool:
    """Return whether a warning is due that only the first frame of an animated file is used."""
    # GIF and WebP files in a folder of images were reported when the folder was listed
    is_reported = source.table.source.directory is not None and path.suffix.lower() in ANIMATION_SUFFIXES
    return source.table.kind == "image" and not is_reported


def _find_problems(colors: Colors, keeps_transparency: bool) -> dict[str, str]:
    """Return warnings about a file's colors, each with the details that follow its path (or "")."""
    warnings = {}
    if colors.is_transparent and not keeps_transparency:
        warnings["are transparent and filled with white"] = ""
    if colors.is_converted:
        warnings[CONVERTED] = ""
    if colors.rejection is not None:
        warnings["have a color profile that is not used"] = f": {colors.rejection}"
    if colors.hdr is not None:
        warnings[PALE] = f": {colors.hdr}"
    if colors.is_interlaced:
        warnings[TORN] = ""
    return warnings


def find_reordered(sources: Sequence[MediaSource]) -> list[Fault]:
    """Return a warning for each folder of frames in which numerical and alphabetical order differ.

    At most MAX_CHECKED_FILES local folders are listed. Unreadable folders are reported elsewhere.
    """
    warnings: dict[Path, Fault | None] = {}  # by folder; None: no warning
    for source in sources:
        if source.remote_or_packed or source.table.kind == "image":
            continue
        for path, _ in source.latent_inputs:
            if path in warnings or not path.is_dir() or len(warnings) == MAX_CHECKED_FILES:
                continue
            warnings[path] = None
            with contextlib.suppress(MediaError, OSError):
                pair = reordered_images(path)
                if pair is not None:
                    earlier, later = pair
                    text = f"{path}: {earlier.name} comes before {later.name}"
                    warnings[path] = Fault(REORDERED, text, source.stem)
    return [warning for warning in warnings.values() if warning is not None]
