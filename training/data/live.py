"""Captions that are encoded during training.

Text encoders stay loaded if captions vary, if the encoders are trained, or if there are no caches. Every
process encodes the captions of its own micro-batches.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from protocols.data import Batch, Conditions
from protocols.family import LearningEncoder, TextEncoder, can_divide
from protocols.loading import BlockSharder
from protocols.requests import Prompt, Prompts
from protocols.steps import EncodedPrompts
from runtime.offload.joining import take_turns

logger = logging.getLogger(__name__)


class WithNetwork(TextEncoder, Protocol):
    """A text encoder with a loaded `nn.Module`, through which gradients can flow."""

    @property
    def network(self) -> nn.Module:
        """The loaded network."""


@dataclass(frozen=True)
class LiveTextEncoders:
    """Text encoders that run during training; outputs of other text encoders are cached."""

    encoders: Sequence[TextEncoder]
    learning_encoders: Sequence[LearningEncoder] = ()  # encoders that are trained, or get a LoRA
    # LoRA prefixes of all trainable encoders, in the order of --text_encoder_lr
    trainable_prefixes: Sequence[str] = ()
    word_encoders: Sequence[WithNetwork] = ()  # encoders that learn the vectors of a new word
    adds_empty_prompt: bool = False  # batches also get the empty prompt, for targets that need it

    @property
    def keys(self) -> frozenset[str]:
        """Names of all tensors that the loaded encoders compute, which caches need not contain."""
        return frozenset().union(*(encoder.keys for encoder in self.encoders))

    def load(self, device: torch.device, block_sharder: BlockSharder | None = None) -> None:
        """Load all encoders with frozen weights; the caller adds their trained parts.

        Args:
            device: Device of the run.
            block_sharder: Splits the blocks of untrained encoders over processes; None keeps them complete.
        """
        for encoder in self.encoders:
            is_frozen = not self._is_trained(encoder)
            if block_sharder is not None and can_divide(encoder) and is_frozen:
                encoder.blocks = block_sharder
            encoder.load(device)
        for encoder in self.trained_encoders:
            encoder.network.requires_grad_(False)
        if names := " and ".join(encoder.name for encoder in self.encoders):
            logger.info("Captions are encoded while training, by %s.", names)

    def free(self) -> None:
        """Release the weights of all loaded text encoders."""
        for encoder in self.encoders:
            encoder.free()

    @property
    def trained_encoders(self) -> list["WithNetwork"]:
        """Return the text encoders that are trained, in the order of `encoders`."""
        return [cast(WithNetwork, encoder) for encoder in self.encoders if self._is_trained(encoder)]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Return the trained text encoder networks by their LoRA prefix. Call `load` first."""
        return {encoder.lora_prefix: encoder.network for encoder in self.learning_encoders}

    @property
    def networks_with_new_word(self) -> dict[str, nn.Module]:
        """Return the text encoder networks that learn a new word, by the names of the encoders."""
        return {encoder.name: encoder.network for encoder in self.word_encoders}

    def networks_for(self, is_embedding: bool) -> dict[str, nn.Module]:
        """Return `networks_with_new_word` if a new word is trained alone, else `networks`."""
        return self.networks_with_new_word if is_embedding else self.networks

    def add_encoded_captions(self, batch: Batch) -> Batch:
        """Return the batch with the outputs of these encoders for its captions, B first, on the CPU.

        Trained encoders run with gradients if these are enabled, all others without.
        """
        prompts = [Prompt(caption) for caption in batch.captions]
        tensors = dict(batch.tensors)
        for encoder in self.encoders:
            encoded = self._encode(encoder, prompts)
            for name in encoder.keys:
                rows = [conditions[name] for conditions in encoded]
                tensors[name] = stack_texts(rows, name in encoder.variable_length)
        batch = replace(batch, tensors=tensors)
        return self._add_empty(batch) if self.adds_empty_prompt else batch

    def _add_empty(self, batch: Batch) -> Batch:
        """Return the batch with `empty_text` set to the outputs of these encoders for the empty prompt."""
        empty_text = dict(batch.empty_text)
        for encoder in self.encoders:
            with torch.no_grad():
                encoded = self._encode(encoder, [Prompt("")])[0]
            for name in encoder.keys:
                rows = [encoded[name]] * len(batch)
                empty_text[name] = stack_texts(rows, name in encoder.variable_length)
        are_empty = tuple(not caption for caption in batch.captions)
        return replace(batch, empty_text=empty_text, has_empty_text=are_empty if any(are_empty) else ())

    def encode_again(
        self, prompts_by_section: Mapping[int, Prompts], encoded: Mapping[int, EncodedPrompts]
    ) -> dict[int, EncodedPrompts]:
        """Return the encoded prompts of a sample, with the outputs of trained encoders recomputed.

        The returned tensors have no batch dimension.

        Args:
            prompts_by_section: Prompts of the sections in which a clip is generated; most models have one.
            encoded: Outputs of all encoders for these prompts, also by section.
        """
        with torch.no_grad():
            return {
                section: self._encode_prompts_again(prompts, encoded[section])
                for section, prompts in prompts_by_section.items()
            }

    def _encode_prompts_again(self, prompts: Prompts, encoded: EncodedPrompts) -> EncodedPrompts:
        encoded_again: dict[str, dict[str, Tensor | list[Tensor]]] = {}
        for name in ("positive", "negative", "blank", "nag"):
            prompt, conditions = getattr(prompts, name), getattr(encoded, name)
            if prompt is not None and conditions is not None:
                encoded_again[name] = dict(conditions)
                for encoder in self.trained_encoders:
                    encoded_again[name] |= encoder.encode([prompt])[0]
        return replace(encoded, **encoded_again)

    def _encode(self, encoder: TextEncoder, prompts: Sequence[Prompt]) -> list[Conditions]:
        if self._is_trained(encoder):
            return encoder.encode(prompts)
        with torch.no_grad():
            if can_divide(encoder) and encoder.blocks is not None:
                return take_turns(encoder.encode, prompts)
            return encoder.encode(prompts)

    def _is_trained(self, encoder: TextEncoder) -> bool:
        return any(encoder is trained for trained in (*self.learning_encoders, *self.word_encoders))


def stack_texts(values: Sequence[Tensor | list[Tensor]], is_varying: bool) -> Tensor | list[Tensor]:
    """Stack the outputs of a text encoder for a batch.

    Returns:
        One tensor B ..., or a list with one entry per sample if their lengths vary.
    """
    rows = [value[0] if isinstance(value, list) else value for value in values]
    return rows if is_varying or isinstance(values[0], list) else torch.stack(rows)
