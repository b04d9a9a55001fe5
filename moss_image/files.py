"""Transformer files of MOSS-Image, and the files of a run: transformer, FLUX.2's autoencoder and Qwen3.5.

Transformers have the released names; Comfy-Org's stack queries, keys and values. Base and SFT have equal
tensors: only names distinguish them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from checkpoints.dialects import DitShapes, cut_parts, make_wrong_kind_error, parted_shapes
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.model_files import inside, read_once
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelFiles, qwen3_chat, qwen_tokenizer
from encoders.language_models import QWEN35
from encoders.picture_prompts import ImagePromptFormat
from flux_2.vae import Flux2Vae, load_vae, read_vae
from modules.errors import CheckpointError
from moss_image.configs import AXES, MossImageConfig
from moss_image.model import END_MODULATION_ROWS, MODULATION_ROWS, MossImageModel
from moss_image.names import MOSS_IMAGE
from moss_image.options import NAME
from moss_image.references import SHOWN_PIXELS, read_encoder_image, shrink
from networks.names.layouts import joined_tensors
from protocols.loading import TensorSource

KEY = "qwen3_5_embed"
MODEL_KIND = f"a {NAME} transformer"
DIT_OPTION = "--dit"
FILES = "moss_image_base_bf16.safetensors of Comfy-Org, or the folder transformer of MOSS-Image-Base"
IDENTIFYING_TENSOR = "shared_block_modulation.weight"
FUSED_LAYERS = joined_tensors(MOSS_IMAGE)
STACKED_QKV_WEIGHT = "layers.0.proj.qkv.weight"
RESCALED = "kohakumoss_fp16_fix"  # in metadata of files whose weights were divided for float16
MAX_TOKENS = 4096  # maximum length of a prompt with its template; the rest is cut off, as in the release
RELEASE = re.compile(r"(?<![a-z])(sft|base)(?![a-z])")  # in the name of a file or folder
_BEFORE, _AFTER = qwen3_chat(thinks=True)
_SOURCE = qwen_tokenizer("--text_encoder_tokenizer", "OpenMOSS-Team/MOSS-Image-Base")
ENCODER_SETTINGS = LanguageEncoderSettings(
    name="qwen3_5",
    states_key=KEY,
    model=QWEN35,
    # inside the encoder's folder; next to a file; next to text_encoder (diffusers)
    source=replace(
        _SOURCE, files=replace(_SOURCE.files, folders=(".", "qwen_3_5", "tokenizer", "../tokenizer"))
    ),
    max_length=MAX_TOKENS,
    template_prefix=_BEFORE,
    template_suffix=f"{_AFTER}<think>\n",
    strips_prompt=True,
    batch_size=1,  # so that a state does not depend on other prompts, to the last bit
    image_format=ImagePromptFormat(
        "Picture {number}: <|vision_start|>{tokens}<|vision_end|>",
        read=read_encoder_image,
        show=shrink,
        min_pixels=32 * 32,
        max_pixels=SHOWN_PIXELS,
        loads_tower_at_once=False,
    ),
)


def _read_header(checkpoint: Checkpoint) -> DitHeader[MossImageConfig]:
    """Return the dimensions, tensor naming and dtype of a MOSS-Image file."""
    names = checkpoint.tensors
    if IDENTIFYING_TENSOR not in names:
        raise make_wrong_kind_error(checkpoint, MODEL_KIND, DIT_OPTION, FILES)
    if RESCALED in checkpoint.metadata:
        raise CheckpointError(
            f"{checkpoint.path}: its weights were rescaled for float16, as its metadata says ({RESCALED}), "
            f"and LoRAs for it fit no other file. Float16 needs no rescaled file here: pass {FILES}.",
            checkpoint.path,
        )
    dialect = "comfy" if STACKED_QKV_WEIGHT in names else "released"
    # ComfyUI's files stack query, key and value: split their shapes by layer
    file_shapes = {name: info.shape for name, info in names.items()}
    shapes = DitShapes(checkpoint.path, parted_shapes(file_shapes, FUSED_LAYERS), NAME)
    config = _read_config(shapes)
    query = STACKED_QKV_WEIGHT if dialect == "comfy" else "layers.0.proj.q.weight"
    return DitHeader(config, dialect, names[query].dtype)


def _read_config(shapes: DitShapes) -> MossImageConfig:
    """Return the dimensions of a transformer. Raises CheckpointError if they do not match each other."""
    dim, channels = shapes.get_shape("video_embedder.weight")
    (head_dim,) = shapes.get_shape("layers.0.q_norm.weight", axes=1)
    ffn_dim = shapes.get_shape("layers.0.proj.ffn_down.weight")[1]
    fits = (
        dim % head_dim == 0
        and head_dim % (2 * AXES) == 0
        and shapes.get_shape("layers.0.proj.q.weight") == (dim, dim)
        and shapes.get_shape("layers.0.proj.ffn_up_gate.weight")[0] == 2 * ffn_dim
        and shapes.get_shape(IDENTIFYING_TENSOR) == (MODULATION_ROWS * dim, dim)
        and shapes.get_shape("video_head_modulation.weight") == (END_MODULATION_ROWS * dim, dim)
    )
    if not fits:
        raise CheckpointError(
            f"{shapes.path}: width {dim}, heads of {head_dim} and feed-forwards of {ffn_dim} do not fit "
            f"{MODEL_KIND}. Copy the file again.",
            shapes.path,
        )
    return MossImageConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=dim // head_dim,
        num_layers=shapes.count_blocks("layers"),
        refiner_blocks=shapes.count_blocks("text_embedder.blocks"),
        channels=channels,
        text_dim=shapes.get_shape("text_embedder.proj.weight")[1],
        freq_dim=shapes.get_shape("time_embedding.0.weight")[1],
    )


def _make_sources(checkpoint: Checkpoint, _: DitHeader[MossImageConfig]) -> Mapping[str, TensorSource]:
    return cut_parts(list_tensor_sources(checkpoint), FUSED_LAYERS)


FORMAT = DitFormat(
    _read_header,
    lambda _: MODEL_KIND,
    network=MossImageModel,
    sources=_make_sources,
    option=DIT_OPTION,
    ignore=("rope.bands",),  # frequencies of the positions, which are computed here
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


def find_sft(dit: Path | None) -> str | None:
    """Return the name of the file or folder that marks a transformer as SFT; None if none does.

    The name nearest to the file decides: the file's own, or the names of its release's folders.
    """
    if dit is None:
        return None
    for name in (dit.name, *(folder.name for folder in dit.absolute().parents[:3])):
        release = RELEASE.search(name.lower())
        if release is not None:
            return name if release[1] == "sft" else None
    return None


@dataclass(frozen=True)
class MossImageFiles(LanguageModelFiles):
    """Model files of a run: the transformer, FLUX.2's autoencoder and Qwen3.5's language model."""

    format: ClassVar = FORMAT
    vae_folder: ClassVar[str] = "vae"
    vae_default: ClassVar = torch.float32
    encoder_settings: ClassVar[LanguageEncoderSettings] = ENCODER_SETTINGS

    @property
    def dit_path(self) -> Path:
        """Return the transformer's path, or for a release folder its subfolder `transformer`."""
        return inside(super().dit_path, "transformer")

    def load_vae(self, device: torch.device) -> Flux2Vae:
        """Load the VAE in the dtype and tile size that the options set."""
        dtype = self.encoder_dtype(self.vae_dtype, self.vae_default)
        return load_vae(self.vae_path, device, dtype, self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the VAE of this model."""
        read_once(self.vae_path, read_vae)
