"""Warnings about the media and captions of a dataset, which caching, training and --check share."""

import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dataset.sources.captions import SHOWN, Caption, describe_cut, draw_caption, join_parts, split_captions
from dataset.sources.clock import find_other_lengths
from dataset.sources.colors import find_colors, find_reordered
from dataset.sources.frames import find_far_rates
from dataset.sources.media_source import Fault, MediaSource, list_errors
from dataset.sources.numbering import find_number_gaps
from dataset.sources.references import find_equal_references
from dataset.sources.wildcards import fill_wildcards, has_choice
from dataset.table import CaptionChanges
from modules.control_codes import escape_control_codes
from modules.errors import CheckpointError
from protocols.data import LatentSpec
from protocols.family import TextEncoder
from protocols.rules import CountTokens

logger = logging.getLogger(__name__)

NAMED = 3  # maximum number of captions that a warning names
LONE_BRACE = "captions have a brace that belongs to no {a|b}, and learn it as text"
NOT_DRAWN = (
    "captions have {a|b}, which is learned as text: only enable_wildcard = true of a [[datasets.subsets]] "
    "draws one of them"
)
BACKSLASH = (
    "captions have a backslash before a bracket, which is learned; prompts in which brackets are weights "
    "omit it. Remove the backslashes"
)
UNVARIED = (
    "captions are JSON objects, which shuffle_caption, caption_tag_dropout_rate, token_warmup_step and "
    "enable_wildcard leave as they are"
)
_BACKSLASH = re.compile(r"\\[()\[\]]")
_SPECIAL = frozenset("{}\\")  # characters that the warnings about captions are about


# --- media
# ------------------------------------------------------------------------------------------------------------


def find_media_warnings(
    sources: Sequence[MediaSource], latent: LatentSpec, fps: float, has_rates: bool
) -> list[Fault]:
    """Return warnings about frame rates, lengths, order, numbering, references and colors of media files.

    Args:
        sources: Media files to check.
        latent: Latent space of the family.
        fps: Frame rate of the model.
        has_rates: Whether the model accepts clips of any rate.
    """
    have_references = any(source.references or source.control for source in sources)
    have_masks = any(source.mask or source.control_mask for source in sources)
    have_layers = any(source.layers for source in sources)
    are_listed = any(source.table.source.directory is None for source in sources)
    warnings = [] if has_rates else find_far_rates(sources, fps)
    if have_references or have_masks:
        warnings += find_other_lengths(sources, fps)
        warnings += find_equal_references(sources)
    # control media, references and masks, and the items of lists, may be folders of frames
    if have_references or have_masks or are_listed:
        warnings += find_reordered(sources)
    if have_references or have_layers:
        warnings += find_number_gaps(sources)
    if have_references:
        from dataset.sources.companions import find_moving_references  # few tables have references

        warnings += find_moving_references(sources)
    return warnings + find_colors(sources, latent.keeps_alpha)


# --- captions
# ------------------------------------------------------------------------------------------------------------


def unvaried_captions(source: MediaSource) -> Iterator[str]:
    """Yield the captions of an item as an encoder gets them when nothing is dropped or shuffled.

    One alternative of each choice `{a|b}` is drawn, always the same.
    """
    table = source.table
    if source.caption is None:
        return
    if not table.captions.changes.varies_per_step:
        yield from (source.caption, *source.more_captions)
        return
    for caption in split_captions(source.caption, table):
        yield join_parts(draw_caption(caption, table, random.Random(0)), table.captions.changes)


def find_caption_warnings(sources: Iterable[MediaSource]) -> list[Fault]:
    """Return warnings about special characters in captions, which would probably be learned by mistake."""
    warnings: list[Fault] = []
    for source in sources:
        changes = source.table.captions.changes
        kinds: dict[str, None] = {}  # ordered, each kind once
        for text in (source.caption or "", *source.more_captions):
            if _SPECIAL.isdisjoint(text):
                continue
            for caption in split_captions(text, source.table):
                kinds |= dict.fromkeys(_find_special(caption, changes))
        if kinds:
            one_line = " ".join((source.caption or "").split())
            excerpt = one_line if len(one_line) <= SHOWN else f"{one_line[:SHOWN]}..."
            text = f"{source.caption_path or source.path}: {excerpt}"
            warnings += [Fault(kind, text, source.stem) for kind in kinds]
    return warnings


def _find_special(caption: Caption, changes: CaptionChanges) -> Iterator[str]:
    """Yield the kinds of warnings about braces and backslashes in a caption."""
    has_braces = "{" in caption.text and has_choice(caption.text)
    if caption.is_object:
        if changes.moves_tags or (changes.wildcards and has_braces):
            yield UNVARIED
    elif changes.wildcards:
        if fill_wildcards(caption.text, random.Random(0)).has_lone_brace:
            yield LONE_BRACE
    elif has_braces:
        yield NOT_DRAWN
    if _BACKSLASH.search(caption.text):
        yield BACKSLASH


def find_cut_captions(
    sources: Iterable[MediaSource], counters: Mapping[str, CountTokens]
) -> tuple[list[Fault], dict[str, list[int]]]:
    """Return a warning for each caption that a text encoder truncates, and the embeddings' sizes by encoder.

    The sizes are in bytes, one for each caption. `counters` are functions that count the tokens of a text, by
    name of the encoder.
    """
    warnings = []
    sizes_bytes: dict[str, list[int]] = {}
    for source in sources:
        path = source.caption_path or source.path
        for caption in unvaried_captions(source):
            for name, count_tokens in counters.items():
                count = count_tokens(caption)
                sizes_bytes.setdefault(name, []).append(count.size_bytes)
                if count.is_cut:
                    kind = f"have a caption longer than {name} reads"
                    warnings.append(Fault(kind, describe_cut(path, name, count), source.stem))
    return warnings, sizes_bytes


def warn_cut_captions(encoder: TextEncoder, captions: Sequence[tuple[Path | str, str]]) -> None:
    """Warn about captions with more tokens than the encoder reads; their ends are not used.

    `captions` are pairs of a caption file (or the name of a media file) and the caption.
    """
    try:
        count_tokens = encoder.token_counter()
    except CheckpointError as error:
        logger.info("tokens of the captions are not counted: %s", error)
        return
    num_cut = 0
    lines: list[str] = []
    for path, caption in captions:
        count = count_tokens(caption)
        if not count.is_cut:
            continue
        num_cut += 1
        if len(lines) < NAMED:
            lines.append(describe_cut(path, encoder.name, count))
    if num_cut:
        logger.warning(
            "%d of %d captions are longer than %s reads; the rest of them is not used. The first:\n  %s",
            num_cut,
            len(captions),
            encoder.name,
            escape_control_codes("\n  ".join(lines)),
        )


def log_warnings(warnings: Sequence[Fault], maximum: int) -> None:
    """Log all warnings as one message, with at most `maximum` of each kind."""
    if warnings:
        logger.warning("%s", escape_control_codes("\n".join(list_errors(warnings, maximum))))
