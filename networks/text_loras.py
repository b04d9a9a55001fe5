"""What LoRA files change in text encoders: taken out of them, and added to loaded encoders."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from logging import getLogger

import torch
from torch import nn

from modules.contract.family import TextEncoder, can_learn
from modules.errors import CheckpointError
from networks.apply import LoraPatch
from networks.key_formats import OURS
from networks.loading import LoraFile, list_some
from networks.lora_network import prefix_of
from networks.names.text_encoders import published_path
from networks.uses import LoraUse

logger = getLogger(__name__)


def uses_for_text(uses: Iterable[LoraUse], prefix: str) -> list[LoraUse]:
    """Return what LoRAs change in the text encoder of a prefix, as uses for its own file."""
    parts = [replace(use, lora=text_part(use.lora, prefix)) for use in uses]
    return [part for part in parts if part.lora.tensors]


def text_part(lora: LoraFile, prefix: str) -> LoraFile:
    """Return the part of a LoRA that changes the text encoder with this prefix, as a LoRA for its file."""
    tensors = {
        OURS + name.removeprefix(f"{prefix}_"): tensor
        for name, tensor in lora.text_tensors.items()
        if prefix_of(name) == prefix
    }
    return replace(lora, tensors=tensors, text_tensors={}, metadata=_without_family(lora.metadata))


def _without_family(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata that say nothing of the DiT that a LoRA is for."""
    return {key: value for key, value in metadata.items() if not key.startswith(("ss_base", "modelspec"))}


class TextLoras:
    """Adds LoRAs to text encoders after they are loaded, once each."""

    def __init__(self, uses: Sequence[LoraUse]) -> None:
        self._uses = [use for use in uses if use.lora.text_tensors]
        self._done: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def tell_unused(self, encoders: Sequence[TextEncoder]) -> None:
        """Warn of parts for text encoders that the model does not have, or that cannot take them."""
        taken = {encoder.lora_prefix for encoder in encoders if can_learn(encoder)}
        for use in self._uses:
            names = [name for name in use.lora.text_tensors if prefix_of(name) not in taken]
            if names:
                logger.warning(
                    f"{use.lora.path}: {len(names)} tensors change a text encoder that this model does "
                    f"not have, and are ignored: {list_some(names, 2)}"
                )

    @torch.no_grad()
    def add_to(self, encoder: TextEncoder) -> None:
        """Add what is for a loaded encoder to its weights; do nothing if that is done, or if nothing is.

        Raises CheckpointError if a LoRA does not fit, or for an encoder in 8 bits.
        """
        if not self._uses or not can_learn(encoder) or encoder.network in self._done:
            return
        uses = uses_for_text(self._uses, encoder.lora_prefix)
        if not uses:
            return
        patch = LoraPatch(uses)
        for path, module in encoder.network.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{published_path(path)}.{leaf}"
                if patch.touches(name) and parameter.dtype.itemsize == 1:
                    raise CheckpointError(
                        f"{uses[0].lora.path} changes the text encoder {encoder.name}, whose weights "
                        "are kept in 8 bits.\n  Leave out the option that keeps it in fp8, or give a LoRA "
                        "for the DiT alone.",
                        uses[0].lora.path,
                    )
                parameter.copy_(patch(name, parameter.data))
        patch.check()
        self._done.add(encoder.network)
