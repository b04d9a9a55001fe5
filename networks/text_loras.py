"""Merge LoRAs into loaded text encoders, and into full checkpoints of U-Net and text encoders."""

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.console import list_some
from modules.errors import CheckpointError
from networks.apply import LoraPatch
from networks.loading import WeightedLora, select_network_part
from networks.lora_network import get_prefix, rename_texts
from networks.names.layouts import OURS
from networks.names.texts import TEXT_PROJECTION, open_clip_names, published_parameter
from networks.rounding import LoraRounding
from networks.unused_tensors import describe_text_side
from networks.use_options import NEAREST
from protocols.bundled_embeddings import with_words
from protocols.family import Family, TextEncoder, can_learn, has_text_layers

logger = getLogger(__name__)


def select_for_network(
    weighted_loras: Iterable[WeightedLora], prefix: str = "", prefixes: Collection[str] | None = None
) -> list[WeightedLora]:
    """Return each LoRA's changes to one network, with names as in a LoRA for a transformer.

    LoRAs that do not change the network are left out.

    Args:
        weighted_loras: LoRA files with their strengths.
        prefix: Prefix of a text encoder in LoRA files; "" for the DiT or U-Net.
        prefixes: Prefixes of all text encoders of the model; None if the LoRAs already use these prefixes, as
            after `rename_for_encoders`.
    """
    loras_for_network = []
    for weighted_lora in weighted_loras:
        if prefix:
            # A LoRA's part for one text encoder, named as in a LoRA for a transformer, without its metadata
            text_tensors = weighted_lora.lora.text_tensors
            if prefixes is not None:
                text_tensors = rename_texts(text_tensors, prefixes)
            tensors: dict[str, Tensor] = {}
            for name, tensor in text_tensors.items():
                if get_prefix(name) == prefix:
                    tensors[OURS + name.removeprefix(f"{prefix}_")] = tensor
            # prefixes of metadata keys for the DiT's part of a file: its model, and arguments such as rank
            # masks
            keys_for_dit = ("ss_base", "modelspec", "ss_network_args")
            metadata = {
                key: text
                for key, text in weighted_lora.lora.metadata.items()
                if not key.startswith(keys_for_dit)
            }
            lora = replace(
                weighted_lora.lora,
                tensors=tensors,
                text_tensors={},
                metadata=metadata,
                encoder=prefix,
                changes_other_networks=bool(weighted_lora.lora.tensors) or len(tensors) < len(text_tensors),
            )
        else:
            lora = replace(weighted_lora.lora, text_tensors={})
        if lora.tensors:
            loras_for_network.append(replace(weighted_lora, lora=lora))
    return loras_for_network


class TextLoras:
    """Merges LoRAs into text encoders, and into layers loaded with them, after each encoder is loaded."""

    def __init__(self, weighted_loras: Sequence[WeightedLora], rounding: str = NEAREST) -> None:
        """Select the LoRAs that change text encoders or modules loaded with them.

        Args:
            weighted_loras: LoRA files with their strengths.
            rounding: A value of `--lora_rounding`.
        """
        self._rounding = LoraRounding(rounding)
        self._weighted_loras = [
            weighted_lora for weighted_lora in weighted_loras if weighted_lora.lora.text_tensors
        ]
        # changes of transformer modules that are loaded together with a text encoder
        self._connector_loras = select_network_part(weighted_loras, selects_text_encoders=True)
        self._known_prefixes: set[str] = set()  # prefixes of the model's text encoders seen so far
        self._merged: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # networks with merged LoRAs

    @property
    def is_empty(self) -> bool:
        """Return whether no LoRA changes a text encoder or a module that is loaded with one."""
        return not self._weighted_loras and not self._connector_loras

    def warn_about_unused_changes(self, encoders: Sequence[TextEncoder]) -> None:
        """Warn of changes for text encoders that the model lacks or that do not support LoRAs."""
        prefixes = {encoder.lora_prefix for encoder in encoders if can_learn(encoder)}
        self._known_prefixes |= prefixes
        for weighted_lora in self._weighted_loras:
            renamed = rename_texts(weighted_lora.lora.text_tensors, prefixes)
            names = [name for name in renamed if get_prefix(name) not in prefixes]
            if names:
                logger.warning(
                    f"{weighted_lora.lora.path}: {len(names)} tensors change a text encoder that this model "
                    "does not have, or that does not support LoRAs here, and are ignored: "
                    f"{list_some(names, 2)}"
                )
        if not any(has_text_layers(encoder) for encoder in encoders):
            for weighted_lora in self._connector_loras:
                names = [*weighted_lora.lora.tensors]
                logger.warning(
                    f"{weighted_lora.lora.path}: {len(names)} tensors change {describe_text_side(names)}, "
                    f"which this model does not have, and are ignored: {list_some(names, 2)}"
                )

    def add_to(self, encoder: TextEncoder) -> None:
        """Merge the encoder's LoRAs into its weights; do nothing if they are already merged.

        Raises:
            CheckpointError: If a LoRA does not fit, or if the encoder is quantized to 8 bits.
        """
        if self._weighted_loras and can_learn(encoder):
            prefix = encoder.lora_prefix
            weighted_loras = select_for_network(self._weighted_loras, prefix, {prefix, *self._known_prefixes})
            self._merge(weighted_loras, encoder.network, encoder.name)
        if self._connector_loras and has_text_layers(encoder):
            self._merge(self._connector_loras, encoder.text_layers, encoder.name)

    def _merge(self, weighted_loras: Sequence[WeightedLora], network: nn.Module, label: str) -> None:
        """Merge LoRAs into a text encoder, once. Raises CheckpointError if 8-bit weights would change."""
        # already merged
        if not weighted_loras or network in self._merged:
            return
        patch = LoraPatch(weighted_loras, rounding=self._rounding)
        for name, parameter in network.named_parameters():
            if parameter.dtype.itemsize == 1 and patch.changes_parameter(published_parameter(name)):
                raise CheckpointError(
                    f"{weighted_loras[0].lora.path} changes the text encoder {label}, whose weights are kept "
                    "in 8 bits.\n  Omit the option that keeps it in fp8, or pass a LoRA for the DiT "
                    "only.",
                    weighted_loras[0].lora.path,
                )
        patch.bake(network, published_parameter)
        patch.check()
        self._merged.add(network)


def add_lora_words(family: Family, weighted_loras: Iterable[Iterable[WeightedLora]]) -> Family:
    """Return a copy of the family whose prompts may contain the trained words (embeddings) of LoRAs.

    Args:
        family: The model family.
        weighted_loras: LoRA files by expert.

    Raises:
        CheckpointError: If a word's embedding does not fit the family's text encoders.
    """
    embeddings_by_path = {
        weighted_lora.lora.path: weighted_lora.lora.embeddings
        for weighted_lora in chain(*weighted_loras)
        if weighted_lora.lora.embeddings
    }
    return with_words(family, embeddings_by_path, "--lora_weight") if embeddings_by_path else family


UNET = "model.diffusion_model."
# prefix of a text encoder's tensors in a checkpoint, prefix of its modules in LoRA files, whether its names
# are OpenCLIP's
_TEXT_ENCODERS = (
    ("cond_stage_model.transformer.", "lora_te", False),
    ("cond_stage_model.model.", "lora_te", True),
    ("conditioner.embedders.0.transformer.", "lora_te1", False),
    ("conditioner.embedders.1.model.", "lora_te2", True),
)
_CLIP_LEVEL = "text_model."  # first level of the names in transformers' CLIP


@dataclass(frozen=True)
class TensorPiece:
    """A tensor in a Stable Diffusion checkpoint, or one third of a tensor that fuses q, k and v."""

    text_encoder: str  # "" for the U-Net, else the prefix of the text encoder in LoRA files
    name: str  # dotted name as in LoRA files; for the U-Net, the name in the checkpoint
    third: int | None = None  # which third of the rows, 0 to 2; None: all rows
    is_transposed: bool = False

    def take_rows(self, tensor: Tensor) -> Tensor:
        """Return a view of this piece of the tensor: all rows, one third of the rows, or the transpose."""
        if self.is_transposed:
            return tensor.t()
        return tensor if self.third is None else tensor.chunk(3)[self.third]


def is_full(names: Iterable[str]) -> bool:
    """Return whether tensor names belong to a full Stable Diffusion checkpoint: U-Net and text encoders."""
    networks = {name.partition(".")[0] for name in names}
    return "model" in networks and not networks.isdisjoint({"cond_stage_model", "conditioner"})


def list_pieces(name: str) -> list[TensorPiece]:
    """Return the pieces of a checkpoint's tensor; [] if LoRAs do not change it (autoencoder, ...)."""
    if name.startswith(UNET):
        return [TensorPiece("", name)]
    for checkpoint_prefix, prefix, is_open_clip in _TEXT_ENCODERS:
        if not name.startswith(checkpoint_prefix):
            continue
        path = name.removeprefix(checkpoint_prefix)
        if path.removesuffix(".weight") == TEXT_PROJECTION:
            # OpenCLIP's projection is a parameter, the transpose of a Linear's weight
            return [TensorPiece(prefix, f"{TEXT_PROJECTION}.weight", is_transposed=path == TEXT_PROJECTION)]
        if is_open_clip:
            # third: OpenCLIP stacks q, k and v in one tensor
            return [TensorPiece(prefix, _CLIP_LEVEL + ours, third) for ours, third in open_clip_names(path)]
        # old and merged files omit this level
        if not path.startswith(_CLIP_LEVEL):
            path = _CLIP_LEVEL + path
        return [TensorPiece(prefix, path)]
    return []


class FullPatch:
    """Weight patch with the methods of `LoraPatch` for a full Stable Diffusion checkpoint."""

    def __init__(
        self,
        weighted_loras: Sequence[WeightedLora],
        names: Iterable[str],
        model: Path,
        rounding: LoraRounding | None = None,
    ) -> None:
        """Create a weight patch for each network in a checkpoint.

        Args:
            weighted_loras: LoRA files with their strengths.
            names: Names of all tensors in the file.
            model: File of the checkpoint, for messages.
            rounding: Rounding of changed 16-bit weights, whose report covers all networks together.
        """
        names = list(names)
        # prefixes of the text encoders in the file
        prefixes = sorted({piece.text_encoder for name in names for piece in list_pieces(name)} - {""})
        renamed_loras = rename_for_encoders(weighted_loras, str(model), prefixes)
        unet_names = [name for name in names if name.startswith(UNET)]
        # by the prefix of the network in LoRA files; "": the U-Net
        self._patches = {
            "": LoraPatch(select_for_network(renamed_loras), unet_names, model, rounding=rounding)
        }
        for prefix in prefixes:
            text_loras = select_for_network(renamed_loras, prefix)
            self._patches[prefix] = LoraPatch(text_loras, model=model, rounding=rounding)

    def changes_parameter(self, name: str) -> bool:
        """Return whether any LoRA file changes the tensor of this name."""
        return any(patch.changes_parameter(piece.name) for piece, patch in self._list_pieces(name))

    def add_to(self, name: str, tensor: Tensor, target: torch.dtype | None = None) -> Tensor:
        """Add the LoRAs' changes to a tensor in place, one piece (the weight of one module) at a time.

        Args:
            name: Name of the tensor in the checkpoint.
            tensor: The tensor.
            target: Dtype to which the caller will round the tensor; None if it keeps its dtype.
        """
        for piece, patch in self._list_pieces(name):
            patch.add_to(piece.name, piece.take_rows(tensor), target)
        return tensor

    def check(self) -> None:
        """Warn of LoRA modules that a network lacks; raise CheckpointError if it lacks a whole LoRA."""
        for patch in self._patches.values():
            patch.check()

    def _list_pieces(self, name: str) -> Iterator[tuple[TensorPiece, LoraPatch]]:
        """Yield each piece of a tensor, such as q, k or v, with the `LoraPatch` that changes it."""
        for piece in list_pieces(name):
            yield piece, self._patches[piece.text_encoder]


def rename_for_encoders(
    weighted_loras: Iterable[WeightedLora], model: str, prefixes: Collection[str]
) -> list[WeightedLora]:
    """Rename LoRAs to the prefixes of a model's text encoders; warn of changes to other encoders.

    Args:
        weighted_loras: LoRA files with their strengths.
        model: Name of the model, for messages.
        prefixes: Prefixes of the model's text encoders in LoRA files.

    Raises:
        CheckpointError: If a LoRA changes only other text encoders.
    """
    renamed: list[WeightedLora] = []
    for weighted_lora in weighted_loras:
        text_tensors = rename_texts(weighted_lora.lora.text_tensors, prefixes)
        warn_about_other_encoders(weighted_lora, text_tensors, model, prefixes)
        renamed.append(replace(weighted_lora, lora=replace(weighted_lora.lora, text_tensors=text_tensors)))
    return renamed


def warn_about_other_encoders(
    weighted_lora: WeightedLora, text_tensors: Iterable[str], model: str, prefixes: Collection[str]
) -> None:
    """Warn of changes to text encoders that a model lacks.

    Args:
        weighted_lora: The LoRA file.
        text_tensors: Names of its tensors for text encoders; encoders of the model have the model's prefixes.
        model: Name of the model, for messages.
        prefixes: Prefixes of the model's text encoders in LoRA files.

    Raises:
        CheckpointError: If the LoRA changes nothing but such text encoders.
    """
    text_names = list(text_tensors)
    path = weighted_lora.lora.path
    unusable = [name for name in text_names if get_prefix(name) not in prefixes]
    if unusable and not weighted_lora.lora.tensors and len(unusable) == len(text_names):
        raise CheckpointError(
            f"{path} changes only text encoders, which {model} does not contain: "
            f"{list_some(unusable, 2)}.\n  Pass a LoRA that was trained for this model.",
            path,
        )
    if unusable:
        logger.warning(
            f"{path}: {len(unusable)} tensors change a text encoder, which {model} does not contain, and "
            f"are ignored: {list_some(unusable, 2)}"
        )
