"""Pictures and clips whose colours need a word: transparent ones, those with a profile, HDR."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from dataset.sources.fetching import fetch
from dataset.sources.media_source import Fault, MediaSource, Origin, Remote
from modules.errors import MediaError
from modules.media.colours import Colours
from modules.media.reading import media_colours

LOOKED_AT = 10_000  # pictures and clips of a dataset


def keeps_transparency(source: MediaSource, masks_latents: bool) -> tuple[bool, bool]:
    """Return whether a source and its control media keep the colours below what is transparent.

    masks_latents: of the family's LatentSpec.
    """
    by_family = masks_latents and source.table.kind == "image"
    return by_family or source.table.alpha_mask, by_family


def shown_otherwise(source: MediaSource, masks_latents: bool) -> str | None:
    """Return which of a source's files has colours that earlier versions read in another way (`as_shown`).

    What has yet to be downloaded counts as equal.
    """
    if source.tensors is not None or any(
        isinstance(origin, Remote) and not path.exists() for path, origin in source.parts
    ):
        return None
    with fetch(source) as here:
        first, others = keeps_transparency(source, masks_latents)
        masks = [] if here.mask is None else [(here.mask, False)]
        return _otherwise([(here.path, first), *((path, others) for path in here.control), *masks])


def references_otherwise(references: Sequence[tuple[Path, Origin | None]]) -> str | None:
    """Return the same of reference pictures that are on disk."""
    return _otherwise([(path, False) for path, origin in references if origin is None])


def _otherwise(parts: Sequence[tuple[Path, bool]]) -> str | None:
    """parts: each with whether the colours below what is transparent are kept."""
    for path, keeps in parts:
        with contextlib.suppress(MediaError, OSError):  # reading it says so
            colours = media_colours(path)
            if colours.is_converted or (colours.is_transparent and not keeps):
                return (
                    f"{path.name} is transparent, or has a colour profile: it was read without, now with it"
                )
    return None


def find_colours(sources: Sequence[MediaSource], masks_latents: bool = False) -> list[Fault]:
    """Return a remark for each file whose colours are not just its numbers, once for each.

    Of at most LOOKED_AT files that are here. Unreadable files are reported elsewhere.
    """
    told: dict[tuple[Path, str], Fault] = {}
    looked: dict[Path, Colours] = {}
    for source in sources:
        if source.origins or source.tensors is not None:
            continue
        keeps = keeps_transparency(source, masks_latents)
        for number, path in enumerate((source.path, *source.control)):
            if len(looked) == LOOKED_AT and path not in looked:
                return list(told.values())
            try:
                colours = looked[path] = looked.get(path) or media_colours(path)
            except (MediaError, OSError):
                continue
            for kind, text in _kinds(colours, keeps[min(number, 1)]):
                told.setdefault((path, kind), Fault(kind, f"{path}{text}", source.stem))
    return list(told.values())


def _kinds(colours: Colours, keeps_alpha: bool) -> list[tuple[str, str]]:
    found = []
    if colours.is_transparent and not keeps_alpha:
        found.append(("are transparent and laid on white", ""))
    if colours.is_converted:
        found.append(("have a colour profile, or colours other than sRGB, and are converted to sRGB", ""))
    if colours.fault is not None:
        found.append(("have a colour profile that is not used", f": {colours.fault}"))
    if colours.hdr is not None:
        kind = "are HDR, and their brightness is not converted: they look pale. Convert them to SDR first"
        found.append((kind, f": {colours.hdr}"))
    if colours.is_interlaced:
        found.append(
            ("are interlaced, which is not undone: what moves is torn into lines. Deinterlace them first", "")
        )
    return found
