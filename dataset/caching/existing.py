"""What is there already: caches of a table by their sources, and tensors that were computed before.

A cache is removed only if its tensor names show that it is one, and only if it was there before the run
listed its sources. Moments and embeddings of other programs (load_tensors) are used if the family can.
"""

import dataclasses
import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset.cache.files import Header, LatentName, latent_names
from dataset.cache.records import difference
from dataset.cache.store import CacheStore
from dataset.caching.text_plans import CaptionFile
from dataset.config import DatasetTable
from dataset.sources.cogvideox import PREPARED, explain_channels, read_prepared, read_tensor
from dataset.sources.media_source import Fault, MediaSource, raise_faults
from modules.checkpoints.containers import load_pickled
from modules.contract.data import Conditions, MediaTable
from modules.contract.family import Caches, TextEncoder
from modules.devices import dtype_name
from modules.errors import CacheError, CheckpointError, DatasetError, MediaError
from modules.text_files import parse_json, read_text

logger = logging.getLogger(__name__)


# the latent cache files of one source, with what their names say but for the stem
Names = Mapping[str, LatentName]


class LatentNames:
    """The latent caches of a table by the stem of their source. There may be millions."""

    def __init__(self, store: CacheStore, tag: str, kind: str) -> None:
        """List them, without opening one. kind: of the table, "image" or "video"."""
        self._rest: dict[str, LatentName] = {}  # by the end of a name
        self._files: dict[str, tuple[str, ...]] = {}  # by stem; mostly there is one
        for file, stem, rest in latent_names(store.names(), tag, kind):
            self._rest.setdefault(file[len(stem) :], rest)
            self._files[stem] = (*self._files.get(stem, ()), file)

    def of(self, stem: str) -> Names:
        """Return those of one source."""
        return {file: self._rest[file[len(stem) :]] for file in self._files.get(stem, ())}

    def not_in(self, names: Container[str], but_of: Container[str]) -> list[str]:
        """Return the files that are not among `names`, by stem, without those of the sources `but_of`."""
        stale = [
            (stem, file)
            for stem, files in self._files.items()
            for file in files
            if file not in names and stem not in but_of
        ]
        return [file for _, file in sorted(stale)]


ExistingNames = Mapping[int, LatentNames]  # by table index


def names_of(existing: ExistingNames, source: MediaSource) -> Names:
    """Return the existing cache files of one source."""
    return existing[source.table.index].of(source.stem)


def remove_caches(store: CacheStore, names: Iterable[str], is_cache: Callable[[Header], bool]) -> int:
    """Remove those of `names` whose tensor names show that they are caches; return how many were removed."""
    count = 0
    for name in names:
        if store.is_shared(name):
            continue
        try:
            is_ours = is_cache(store.read(name, is_whole=False).header)
        except CacheError as error:
            if name not in store:  # another process has just removed it
                continue
            is_ours = store.holds_only_caches
            if not is_ours:
                logger.warning(
                    "%s. It belongs to no item, but is kept because it may not be a cache file.", error
                )
        if is_ours:
            store.remove(name)
            count += 1
    return count


def refuse_moments(family: Caches, table: DatasetTable) -> None:
    """Raise DatasetError if the table has load_tensors and the family cannot use moments."""
    if table.load_tensors and family.moments.refusal is not None:
        raise DatasetError(f"{table.name}: load_tensors cannot be used: {family.moments.refusal}.")


def use_moments(family: Caches, sources: Sequence[MediaSource]) -> list[MediaSource]:
    """Return the sources with those of their tensors that the family's latents are made from.

    Raises DatasetError if it cannot use moments, if they are visibly of another model's VAE, or if moments of
    first frames are needed and missing. A file that cannot be read is left to caching.
    """
    given = [source for source in sources if source.tensors is not None]
    if not given:
        return list(sources)
    refuse_moments(family, given[0].table)
    for folder, source in {one.tensors.folder: one for one in reversed(given) if one.tensors}.items():
        _check_vae(family, folder, source)
    if family.moments.with_image:
        kind = "moments of first frames are missing, which this model's image-to-video caches hold"
        images = [(one.stem, one.tensors.image) for one in given if one.tensors is not None]
        raise_faults(
            [
                Fault(kind, str(image), stem)
                for stem, image in images
                if image is not None and not image.exists()
            ]
        )
        return list(sources)
    return [
        source
        if source.tensors is None
        else dataclasses.replace(source, tensors=dataclasses.replace(source.tensors, uses_image=False))
        for source in sources
    ]


def _check_vae(family: Caches, folder: Path, source: MediaSource) -> None:
    """Raise DatasetError if the moments in a folder are of another model's VAE."""
    assert source.tensors is not None
    path = source.tensors.moments
    try:
        channels = next((size for size in read_tensor(path).shape[-4:]), 0)
    except MediaError:
        return  # reported with the other files
    if channels != 2 * family.latent.channels:
        raise DatasetError(
            f"{source.table.name}: {path} has {channels} channels, but "
            f"{explain_channels(channels, family.latent)}."
        )
    prepared = read_prepared(folder)
    if prepared is None or prepared.architecture is None:
        logger.warning(
            "%s: nothing in %s says which VAE made %s. They are used as moments of the VAE of %s; of another "
            "one, the model would learn noise.",
            source.table.name,
            folder,
            path.parent.name,
            family.name,
        )
        return
    if prepared.architecture != family.name:
        raise DatasetError(
            f"{source.table.name}: {path.parent} was made by the VAE of {prepared.architecture} "
            f"({folder / PREPARED}), this is {family.name}. Prepare the data with this model, or leave out "
            "load_tensors."
        )
    theirs, ours = prepared.vae.get("vae"), family.media_identity.get("vae")
    if theirs != ours:
        logger.warning(
            "%s: %s was made with another file of the VAE of %s than --vae. That is right only if both hold "
            "the same weights, such as in another format or precision.",
            source.table.name,
            path.parent,
            family.name,
        )


def embeds_note(path: Path) -> Path:
    """Return the file that names the texts of the embeddings in `path`: NAME.json beside NAME.pt."""
    return path.with_suffix(".json")


def describe_embeds(
    caption: str,
    architecture: str,
    identities: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return the content of that file. identities: of the encoders by name. tensors: by key."""
    return {
        "caption": caption,
        "architecture": architecture,
        "encoders": {name: dict(identity) for name, identity in identities.items()},
        "tensors": {key: _shape_of(tensor) for key, tensor in tensors.items()},
    }


def read_embeds(
    file: CaptionFile, encoder: TextEncoder, identity: Mapping[str, str]
) -> tuple[Conditions | None, str | None]:
    """Return the encoder's outputs for a caption, if computed before, or the reason against them.

    Both are None if there is nothing. Only unchanged embeddings of this encoder and this caption are used;
    others are ignored, as they do not name their origin.
    """
    if file.embeds is None:
        return None, None
    note = embeds_note(file.embeds)
    if not note.exists():
        return None, f"nothing beside it says which encoder made it ({note.name} is missing)"
    try:
        content = parse_json(read_text(note))
        changed = difference(content["encoders"].get(encoder.name, {}), identity)
        if changed is not None:
            return None, f"it was made by another encoder: {changed}"
        if content["caption"] != file.caption:
            return None, f"it is of the caption {content['caption']!r}, which now is {file.caption!r}"
        stated = {key: content["tensors"][key] for key in encoder.keys}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{note.name} cannot be read ({type(error).__name__}: {error})"
    try:
        tensors = load_pickled(file.embeds)
    except CheckpointError as error:
        return None, str(error)
    if isinstance(tensors, Tensor) and len(encoder.keys) == 1:
        tensors = dict.fromkeys(encoder.keys, tensors)
    if not isinstance(tensors, dict):
        return None, f"it holds {type(tensors).__name__}, not tensors by name"
    found: dict[str, Tensor | list[Tensor]] = {}
    for key in encoder.keys:
        tensor = tensors.get(key)
        if not isinstance(tensor, Tensor) or _shape_of(tensor) != stated[key]:
            return None, f"its {key} is not what {note.name} says"
        # a copy: a file that is mapped can change
        found[key] = [tensor.clone()] if key in encoder.variable_length else tensor.clone()
    return found, None


def _shape_of(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}


def refuse_changing(table: DatasetTable, keys: Sequence[str], what: str) -> None:
    """Raise DatasetError if the items to cache change each time. keys: that make it so."""
    if keys:
        raise DatasetError(
            f"{table.name}: {' and '.join(keys)} change what is encoded, so that its {what} cannot be "
            "cached. Leave out the keys, or train without caching these."
        )


def media_table(table: DatasetTable, has_control: bool = False) -> MediaTable:
    """Return a table's facts for families. has_control: whether its items have control media."""
    return MediaTable(
        name=table.name,
        kind=table.kind,
        has_control=has_control,
        target_frames=()
        if table.kind == "image" or table.frame_extraction == "full"
        else table.target_frames,
        max_frames=table.max_frames if table.kind == "video" and table.frame_extraction == "full" else None,
        window=table.fp_latent_window_size,
        clean_indices=table.fp_1f_clean_indices or (),
        target_index=table.fp_1f_target_index,
        has_post=not table.fp_1f_no_post,
    )
