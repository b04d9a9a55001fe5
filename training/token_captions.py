"""Check that captions contain the new word that a training learns."""

import logging
from collections.abc import Sequence

from dataset.batches.items import TrainingItem
from dataset.sources.captions import complete_caption, split_captions
from dataset.sources.media_source import MediaSource
from dataset.table import DatasetTable
from training.learner import ReadCaptions

logger = logging.getLogger(__name__)


def check_captions(read: ReadCaptions, items: Sequence[TrainingItem]) -> None:
    """Warn about captions that lack a new word whose embedding is trained.

    Raises DatasetError if the dataset cannot be read.
    """
    captions = [
        _complete(item.cache_info.on_the_fly_caption(item.source_stem, number), item.table)
        for item in items
        if not item.table.learning.is_reg  # regularization images are for the LoRA only
        for number in range(item.num_captions)
    ]
    remark = read(captions)
    if remark:
        logger.warning("%s", remark)


def check_source_captions(
    read: ReadCaptions, listed: Sequence[tuple[DatasetTable, Sequence[MediaSource]]]
) -> str:
    """Return a warning about the captions of the tables' sources; "" if there is nothing to warn about.

    Raises:
        DatasetError: If a caption cannot be read.
    """
    captions = [
        _complete(caption, table)
        for table, sources in listed
        if not table.learning.is_reg
        for source in sources
        for caption in (source.caption, *source.more_captions)
        if caption is not None
    ]
    return read(captions) if captions else ""


def _complete(caption: str, table: DatasetTable) -> str:
    """Return a caption with the text that training adds at each step, such as the trigger word."""
    if not table.captions.changes.varies_per_step:  # the caption is already complete
        return caption
    caption = "\n".join(
        part.text for part in split_captions(caption, table)
    )  # with enable_wildcard, all lines that may be drawn
    return complete_caption(
        caption, table.captions.trigger_word, table.captions.caption_prefix, table.captions.caption_suffix
    )
