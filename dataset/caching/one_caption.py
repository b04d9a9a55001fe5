"""Encode a single caption and write its outputs to a file of its own, for an item that is recaptioned."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from dataset.cache.records import TextRecord, record_metadata, require_finite
from dataset.cache_files import FORMAT_VERSION, checksum, tensor_name, write_tensors
from dataset.caching.text_plans import find_visible_media
from modules.errors import OptionError
from protocols.family import Caches, FitsCaptions, has_cache_metadata
from protocols.requests import Prompt


@torch.no_grad()
def write_caption(family: Caches, caption: str, path: Path, device: torch.device) -> None:
    """Encode a caption with all text encoders, each loaded and freed in turn, and write a text cache.

    Args:
        family: The model family.
        caption: The complete caption.
        path: File to write.
        device: Device of the encoders.

    Raises:
        OptionError: If the encoders see more than the caption, or a file of theirs is not named.
        CheckpointError: If an encoder's file cannot be used.
    """
    encoders = list(family.text_encoders())
    if any(find_visible_media(encoders)):
        raise OptionError("the text encoders of this model see the media of an item with its caption")
    if family.abilities.adjusts_captions and cast("FitsCaptions", family).has_coordinates(caption):
        raise OptionError("places in the image, which the caption names, depend on the size of the item")
    tensors: dict[str, Tensor] = {}
    records: dict[str, TextRecord] = {}
    metadata: dict[str, str] = {
        "architecture": family.name,
        "caption1": caption,
        "format_version": FORMAT_VERSION,
    }
    for encoder in encoders:
        encoder.load(device)
        try:
            (conditions,) = encoder.encode([Prompt(caption, images=())])
            outputs: dict[str, Tensor] = {}
            for key, output in conditions.items():
                tensor = (output[0] if isinstance(output, list) else output).detach().cpu()
                require_finite(tensor, path.name, key)
                outputs[tensor_name(key, tensor, variable=key in encoder.variable_length)] = tensor
        finally:
            encoder.free()
        if has_cache_metadata(encoder):
            metadata |= encoder.cache_metadata(caption, [])
        crc32 = {name: checksum(name, tensor) for name, tensor in outputs.items()}
        records[encoder.name] = TextRecord(dict(encoder.identity), caption, None, crc32)
        tensors |= outputs
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, metadata | record_metadata(records))
