"""Check that items of a run have what its target needs: the worse one of a pair, or a mask."""

import logging
from collections.abc import Sequence

from contract.data import LOSS_MASK, WORSE_LATENTS
from dataset.batches.items import CachingCommands, TrainingItem
from dataset.batches.reading import explain_no_worse
from dataset.cache.store import Stores
from modules.errors import CacheError, DatasetError

logger = logging.getLogger(__name__)

# items whose headers are read before anything is loaded; of the others when they are learned
LOOKED_AT = 1000


def require_pairs(items: Sequence[TrainingItem], stores: Stores, commands: CachingCommands) -> None:
    """Raise DatasetError or CacheError if an item to learn has no worse one. Reads headers only.

    Looks at about LOOKED_AT items, spread over all tables.
    """
    for table in {item.table.index: item.table for item in items}.values():
        if table.directory is not None and table.worse_directory is None:
            raise DatasetError(
                f"{table.name}: --preference learns from pairs, and this table has no worse_directory. "
                "Give it a folder with the worse ones, named like the better ones, or take the table out"
            )
    step = len(items) // LOOKED_AT + 1
    firsts = {item.table.index: item for item in reversed(items)}
    for item in [*firsts.values(), *items[::step]]:
        if item.kind.sizes is not None:
            raise CacheError(
                f"{item.table.name}: --preference needs the latents of the worse pictures, which are not "
                f"encoded while training. Cache them first:\n  {commands.latents}"
            )
        header = stores.of(item.table).read(item.file_name, is_whole=False)
        if WORSE_LATENTS not in header.keys:
            raise CacheError(explain_no_worse(item.latent_path, commands))


def note_unused_pairs(items: Sequence[TrainingItem]) -> None:
    """Log the tables whose worse ones a run without --preference does not use."""
    tables = {item.table.index: item.table for item in items}.values()
    names = [table.name for table in tables if table.worse_directory is not None]
    if names:
        logger.warning(
            "%s: worse_directory has no effect in this run: it is for --preference. The better ones are "
            "learned as ever",
            ", ".join(names),
        )


def has_masks(items: Sequence[TrainingItem], stores: Stores) -> bool:
    """Return whether any item to learn has a mask of its loss. Reads headers only, up to the first mask."""
    if any(item.table.mask_directory is not None or item.table.alpha_mask for item in items):
        return True
    for item in items:  # masks of lists are named line by line
        if item.kind.sizes is None and LOSS_MASK in stores.of(item.table).read(item.file_name, False).keys:
            return True
    return False
