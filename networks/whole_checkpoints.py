"""LoRAs for checkpoints that hold a U-Net and its text encoders in one file, as Stable Diffusion's do."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path

from torch import Tensor

from modules.errors import CheckpointError
from networks.apply import LoraPatch
from networks.loading import LoraFile, list_some
from networks.lora_network import prefix_of
from networks.text_loras import uses_for_text
from networks.uses import LoraUse

logger = getLogger(__name__)
UNET = "model.diffusion_model."
# beginnings of text encoders' names -> prefix of their modules in LoRA files, whether they are OpenCLIP's
_TEXTS = (
    ("cond_stage_model.transformer.", "lora_te", False),
    ("cond_stage_model.model.", "lora_te", True),
    ("conditioner.embedders.0.transformer.", "lora_te1", False),
    ("conditioner.embedders.1.model.", "lora_te2", True),
)
# OpenCLIP's names -> Hugging Face's, by which LoRA files name the modules
_OPEN_CLIP = (
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)", r"text_model.encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"text_model.encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"text_model.encoder.layers.\1.mlp.fc2.\2"),
    (
        r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)",
        r"text_model.encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (r"ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
)
_HF_START = "text_model."
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")  # q, k and v by rows


@dataclass(frozen=True)
class TensorPiece:
    """A tensor of a network, or a third of one in which the file stacks three."""

    network: str  # "" for the U-Net, else the prefix of the text encoder in LoRA files
    name: str  # as LoRA files have it, with "."; the U-Net's as in the file
    third: int | None = None  # of the rows; None: all

    def of(self, tensor: Tensor) -> Tensor:
        """Return the rows, sharing memory."""
        return tensor if self.third is None else tensor.chunk(3)[self.third]


def is_whole(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a U-Net together with text encoders."""
    starts = {name.partition(".")[0] for name in names}
    return "model" in starts and not starts.isdisjoint({"cond_stage_model", "conditioner"})


def pieces_of(name: str) -> list[TensorPiece]:
    """Return what a tensor of a whole checkpoint is; nothing if LoRAs do not change it (autoencoder, ...)."""
    if name.startswith(UNET):
        return [TensorPiece("", name)]
    for start, prefix, is_open_clip in _TEXTS:
        if not name.startswith(start):
            continue
        own = name.removeprefix(start)
        fused = _FUSED.fullmatch(own) if is_open_clip else None
        if fused is not None:
            layer = f"text_model.encoder.layers.{fused[1]}.self_attn."
            return [
                TensorPiece(prefix, f"{layer}{x}_proj.{fused[2]}", third) for third, x in enumerate("qkv")
            ]
        if not is_open_clip:
            # old and merged files leave this level out
            return [TensorPiece(prefix, own if own.startswith(_HF_START) else _HF_START + own)]
        found = ((re.fullmatch(theirs, own), ours) for theirs, ours in _OPEN_CLIP)
        return [TensorPiece(prefix, match.expand(ours)) for match, ours in found if match is not None]
    return []


class WholePatch:
    """Adds LoRAs to the weights of a whole checkpoint, as `LoraPatch` does to those of one network."""

    def __init__(self, uses: Sequence[LoraUse], names: Iterable[str], model: Path) -> None:
        """names: of all tensors in the file."""
        names = list(names)
        found = {piece.network for name in names for piece in pieces_of(name)}
        self._unet = LoraPatch(
            [replace(use, lora=replace(use.lora, text_tensors={})) for use in uses if use.lora.tensors],
            [name for name in names if name.startswith(UNET)],
            model,
        )
        given = [replace(use, lora=_first_encoder(use.lora, found)) for use in uses]
        warn_of_texts(given, model, found)
        self._texts = {
            prefix: LoraPatch(uses_for_text(given, prefix), model=model, is_text=True)
            for prefix in sorted(found - {""})
        }

    def touches(self, name: str) -> bool:
        """Whether a LoRA changes the tensor of this name."""
        return any(patch.touches(piece.name) for piece, patch in self._of(name))

    def add_to(self, name: str, tensor: Tensor) -> Tensor:
        """Change a tensor in place and return it, as `LoraPatch.add_to`."""
        for piece, patch in self._of(name):
            patch.add_to(piece.name, piece.of(tensor))
        return tensor

    def check(self) -> None:
        """Warn and raise as `LoraPatch.check`, for each network."""
        for patch in (self._unet, *self._texts.values()):
            patch.check()

    def _of(self, name: str) -> Iterator[tuple[TensorPiece, LoraPatch]]:
        for piece in pieces_of(name):
            yield piece, self._texts[piece.network] if piece.network else self._unet


def warn_of_texts(uses: Iterable[LoraUse], model: Path, held: Collection[str]) -> None:
    """Warn of parts for text encoders that a model's file does not hold.

    held: the prefixes of those that it holds. Raises CheckpointError if a LoRA has no other parts.
    """
    for use in uses:
        texts = [name for name in use.lora.text_tensors if prefix_of(name) not in held]
        if not texts:
            continue
        if not use.lora.tensors and len(texts) == len(use.lora.text_tensors):
            raise CheckpointError(
                f"{use.lora.path} changes text encoders alone, which {model} does not hold: "
                f"{list_some(texts, 2)}.\n  Give a LoRA that was trained for this model.",
                use.lora.path,
            )
        logger.warning(
            f"{use.lora.path}: {len(texts)} tensors change a text encoder, which {model} does not hold, "
            f"and are ignored: {list_some(texts, 2)}"
        )


def _first_encoder(lora: LoraFile, networks: set[str]) -> LoraFile:
    """Return a LoRA with the names that the checkpoint's only text encoder has."""
    if "lora_te" not in networks:
        return lora
    renamed = {name.replace("lora_te1_", "lora_te_", 1): one for name, one in lora.text_tensors.items()}
    return replace(lora, text_tensors=renamed)
