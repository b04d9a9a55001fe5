"""Files of a HunyuanImage-2.1 run: kinds and dialects of transformers, paths and dtypes, each checked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

import hunyuan_model.checkpoints as hunyuan_video
from checkpoints.dialects import (
    DitShapes,
    Names,
    find_dialect,
    join_parts,
    make_wrong_kind_error,
    translate_name,
)
from checkpoints.dits import DitFormat, DitHeader, bare_names
from checkpoints.model_files import read_once
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from hunyuan_image.configs import DIT, LATENT, HunyuanImageConfig
from hunyuan_image.model import HunyuanImageModel
from hunyuan_image.names import HUNYUAN_IMAGE
from hunyuan_image.options import HunyuanImageVaeOptions
from hunyuan_image.text_encoders import QWEN_USE, GlyphTextEncoder, QwenTextEncoder
from hunyuan_image.text_files import TEXT_DTYPE, QwenAndByt5Files
from hunyuan_image.vae import HunyuanImageVae, load_vae, read_vae
from hunyuan_model.names import COMFYUI_TENSORS
from modules.errors import CheckpointError
from networks.names.layouts import swapped_tensors, tensor_patterns
from protocols.loading import TensorSource

MODEL_LABEL = "a HunyuanImage-2.1 transformer"
RELEASED_FILES = (
    "dit/hunyuanimage2.1.safetensors of tencent/HunyuanImage-2.1 or hunyuanimage2.1_bf16.safetensors"
)
DIT_OPTION = "--dit"
DIALECTS: Mapping[str, tuple[str, Names]] = {  # dialect -> a tensor that only it has, its names
    "official": ("double_blocks.0.img_attn_qkv.weight", ()),
    "ComfyUI": ("double_blocks.0.img_attn.qkv.weight", COMFYUI_TENSORS),
    "diffusers": ("transformer_blocks.0.attn.add_q_proj.weight", tensor_patterns(HUNYUAN_IMAGE)),
}
# tensors of this model that HunyuanVideo does not have, in the three dialects
GLYPH_TENSORS = ("byt5_in.fc1.weight", "context_embedder_2.linear_1.weight")
VIDEO_TENSORS = ("cond_type_embedding.weight", "cond_type_embed.weight")  # HunyuanVideo 1.5's, which has both
# tensors of the distilled model, which goes from one noise level to another in a single pass
DISTILLED_TENSORS = (
    "time_r_in.mlp.0.weight",
    "time_r_in.in_layer.weight",
    "time_guidance_embed.timestep_embedder_r.linear_1.weight",
    "guidance_in.mlp.0.weight",
    "guidance_in.in_layer.weight",
    "time_guidance_embed.guidance_embedder.linear_1.weight",
)
DIMENSIONS = hunyuan_video.CONFIG_TENSORS  # blocks and refiner have the same names as in HunyuanVideo


def identify(path: Path) -> str | None:
    """Return a hint that a file is a HunyuanImage transformer; None for other files."""
    try:
        with open_checkpoint(path) as opened:
            checkpoint = bare_names(opened)
            if not _has_glyph_layers(checkpoint):
                return None
            kind = "the distilled HunyuanImage-2.1 transformer, which is not supported"
            return f"it is {kind}" if _is_distilled(checkpoint) else f"it is {MODEL_LABEL} ({DIT_OPTION})"
    except CheckpointError:
        return None


def _has_glyph_layers(checkpoint: Checkpoint) -> bool:
    """Return whether a file has the layers that distinguish HunyuanImage from HunyuanVideo."""
    names = checkpoint.tensors
    return any(name in names for name in GLYPH_TENSORS) and not any(name in names for name in VIDEO_TENSORS)


def _is_distilled(checkpoint: Checkpoint) -> bool:
    return any(name in checkpoint.tensors for name in DISTILLED_TENSORS)


def _read_header(checkpoint: Checkpoint) -> DitHeader[HunyuanImageConfig]:
    """Read the header of a HunyuanImage-2.1 file; raise CheckpointError for another model."""
    path = checkpoint.path
    names = checkpoint.tensors
    dialect = find_dialect(DIALECTS, names)
    if dialect is None or not _has_glyph_layers(checkpoint):
        similar_model = hunyuan_video.describe(checkpoint)
        if similar_model is None:
            raise make_wrong_kind_error(checkpoint, MODEL_LABEL, DIT_OPTION, RELEASED_FILES)
        raise CheckpointError(
            f"{path} is not {MODEL_LABEL}; it looks like {similar_model}.\n"
            f"  Pass {RELEASED_FILES} to {DIT_OPTION}.",
            path,
        )
    if _is_distilled(checkpoint):
        raise CheckpointError(
            f"{path} is the distilled HunyuanImage-2.1 transformer (it has guidance_in or time_r_in), which "
            f"is not supported.\n  Pass {RELEASED_FILES} to {DIT_OPTION}.",
            path,
        )
    identifying_tensor, name_patterns = DIALECTS[dialect]
    file_shapes = {translate_name(name, name_patterns): info.shape for name, info in names.items()}
    config = _read_config(DitShapes(path, file_shapes, "HunyuanImage-2.1"))
    return DitHeader(config, dialect, names[identifying_tensor].dtype)


def _read_config(shapes: DitShapes) -> HunyuanImageConfig:
    """Return a transformer's dimensions; raise CheckpointError if they are not HunyuanImage's."""
    dim, in_dim, rows, columns = shapes.get_shape("img_in.proj.weight", axes=4)
    if (rows, columns) != (1, 1):
        raise CheckpointError(
            f"{shapes.path} has patches of {rows} x {columns}, but {MODEL_LABEL} has patches of one "
            f"latent pixel.\n  Pass {RELEASED_FILES} to {DIT_OPTION}.",
            shapes.path,
        )
    if in_dim != LATENT.channels:
        raise CheckpointError(
            f"{shapes.path} takes {in_dim} latent channels, but {MODEL_LABEL} takes {LATENT.channels}.\n"
            f"  Pass {RELEASED_FILES} to {DIT_OPTION}.",
            shapes.path,
        )
    first_width, glyph_dim = shapes.get_shape("byt5_in.fc1.weight")
    return HunyuanImageConfig(
        dim=dim,
        in_dim=in_dim,
        out_dim=shapes.get_shape("final_layer.linear.weight")[0],
        glyph_dim=glyph_dim,
        glyph_hidden=(first_width, shapes.get_shape("byt5_in.fc2.weight")[0]),
        **hunyuan_video.read_block_dimensions(shapes, DIT, DIMENSIONS, dim),
    )


def _make_sources(
    checkpoint: Checkpoint, header: DitHeader[HunyuanImageConfig]
) -> Mapping[str, TensorSource]:
    swapped = swapped_tensors(HUNYUAN_IMAGE) if header.dialect == "diffusers" else ()
    return join_parts(list_tensor_sources(checkpoint), DIALECTS[header.dialect][1], swapped)


FORMAT = DitFormat(_read_header, lambda _: MODEL_LABEL, HunyuanImageModel, _make_sources)
read_dit_header, load_dit = FORMAT.read_header, FORMAT.load


@dataclass(frozen=True)
class HunyuanImageFiles(QwenAndByt5Files):
    """Model files of HunyuanImage: transformer, VAE, the language model of Qwen2.5-VL, and ByT5."""

    vae_chunk_size: int | None = None

    format: ClassVar = FORMAT
    vae_folder: ClassVar[str] = "vae"
    language_settings: ClassVar = QWEN_USE
    glyph_encoder: ClassVar = GlyphTextEncoder
    writes_texts_in: ClassVar[str] = "image"

    def add_vae_options(self, options: HunyuanImageVaeOptions) -> "HunyuanImageFiles":
        """Return a copy of these files with the VAE's options added."""
        files = self.add_vae(options.file)
        return replace(files, vae_tile=options.tile, vae_chunk_size=options.vae_chunk_size)

    def language_model(self) -> QwenTextEncoder:
        """Return the language model's encoder; its file is opened when it is loaded."""
        return QwenTextEncoder(
            self.text_encoder_path,
            dtype=self.encoder_dtype(self.text_dtype, TEXT_DTYPE),
            tokenizer=self.text_encoder_tokenizer,
            form=self.text_form,
            on_cpu=self.text_on_cpu,
        )

    def load_vae(self, device: torch.device) -> HunyuanImageVae:
        """Load the VAE in the dtype and tile size that the options set."""
        dtype = self.encoder_dtype(self.vae_dtype)
        return load_vae(self.vae_path, device, dtype, self.vae_chunk_size, tile=self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the VAE of this model."""
        read_once(self.vae_path, read_vae)
