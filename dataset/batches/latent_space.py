"""Check by the number of channels that cached latents are of the model's VAE."""

from collections.abc import Iterable
from pathlib import Path

from dataset.batches.finding import CachingCommands
from dataset.batches.items import Items, TrainingItem
from dataset.cache.files import Header, tensor_key
from dataset.cache.store import Stores
from modules.contract.data import LatentSpec
from modules.errors import CacheError


def check_channels(
    items: Iterable[TrainingItem],
    latent: LatentSpec,
    commands: CachingCommands,
    stores: Stores | None = None,
) -> None:
    """Raise CacheError, with the caching command, if latents were encoded with the VAE of another model.

    Looks at the header of one file of each table and size: caches of two models in one folder mostly differ
    in their sizes. stores: of the run. Items that are encoded while training have no caches.
    """
    columns, stores = Items.of(items), stores or Stores()
    for places in columns.groups().values():
        item = columns[int(places[-1])]
        if not item.kind.has_latents:
            continue
        header = stores.of(item.table).read_header(item.latent_path.name)
        fault = other_space(item.latent_path, _channels(header), latent)
        if fault is not None:
            raise CacheError(
                f"{fault}.\n  Make them again with: {commands.latents}\n"
                "  To keep caches for both models, give each a cache_directory of its own."
            )


def _channels(header: Header) -> int | None:
    shapes = (header.shapes[name] for name in header.names if tensor_key(name) == "latents")
    return next((shape[0] for shape in shapes if shape), None)


def other_space(path: Path, channels: int | None, latent: LatentSpec) -> str | None:
    """Return the fault of latents of so many channels; None if they fit, or if they are unknown."""
    if channels in {None, latent.channels}:
        return None
    return (
        f"{path}: its latents have {channels} channels, this model's have {latent.channels}: they were "
        "encoded with the VAE of another model"
    )
