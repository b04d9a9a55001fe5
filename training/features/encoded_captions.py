"""Captions that are encoded once, before a run's network is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generation.denoise import conditions_to
from modules.devices import free_memory
from protocols.data import Conditions
from protocols.family import Family, TextEncoder
from protocols.requests import Prompt

CPU = torch.device("cpu")


@dataclass(frozen=True)
class EncodedCaptions:
    """Outputs of all text encoders for a set of captions, by caption."""

    encoded: Mapping[str, Conditions]  # by caption, without batch dimension, on the CPU
    variable_length: frozenset[str]  # names of outputs that are lists in batches


def encode_captions(family: Family, texts: Sequence[str], device: torch.device) -> EncodedCaptions:
    """Encode captions, one text encoder after the other.

    Raises:
        OptionError: If the file of a text encoder is missing.
    """
    family.check_files(media=False)
    encoded: dict[str, dict[str, Tensor | list[Tensor]]] = {text: {} for text in texts}
    variable: set[str] = set()
    for encoder in family.text_encoders():
        variable |= encoder.variable_length
        for text, conditions in zip(texts, _encode(encoder, texts, device), strict=True):
            encoded[text] |= conditions
    return EncodedCaptions(encoded, frozenset(variable))


def _encode(encoder: TextEncoder, texts: Sequence[str], device: torch.device) -> Iterator[Conditions]:
    """Yield the outputs of a text encoder for each caption, moved to the CPU."""
    try:
        encoder.load(device)
        for text in texts:
            with torch.no_grad():
                (conditions,) = encoder.encode([Prompt(text)])
            yield conditions_to(conditions, CPU)
    finally:
        encoder.free()
        free_memory(device)
