"""Transformer files of HunyuanVideo 1.5, and a run's files: transformer, VAE, Qwen2.5-VL, ByT5 and SigLIP.

The release has queries, keys and values apart, under our names; ComfyUI's files fuse them, and diffusers has
its own names. Files that start from text or from an image have equal tensors, and so have those that were
distilled: only names distinguish them.
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

import hunyuan_model.checkpoints as hunyuan_video
from checkpoints.dialects import (
    DitShapes,
    Names,
    cut_parts,
    find_dialect,
    join_parts,
    joined_shapes,
    make_wrong_kind_error,
    parted_shapes,
)
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.encoders import check_state_width
from checkpoints.model_files import inside, read_once, require_file
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.siglip import ENCODER_OPTION, FILES, SiglipVision, load_siglip, read_siglip_width
from hunyuan_image.text_files import QwenAndByt5Files
from hunyuan_model.names import COMFYUI_TENSORS
from hunyuan_video_15.configs import (
    I2V,
    IN_CHANNELS,
    LATENT_CHANNELS,
    NAME,
    T2V,
    TASKS,
    HunyuanVideo15Config,
    HunyuanVideo15Task,
)
from hunyuan_video_15.model import HunyuanVideo15Model
from hunyuan_video_15.names import HUNYUAN_VIDEO_15
from hunyuan_video_15.options import HunyuanVideo15VaeOptions, find_task, release_name
from hunyuan_video_15.spec import DIT
from hunyuan_video_15.text_encoders import QWEN_SETTINGS, QuotedTextEncoder
from hunyuan_video_15.vae import HunyuanVideo15Vae, load_vae, read_vae
from modules.errors import CheckpointError
from networks.names.layouts import joined_tensors, swapped_tensors, tensor_patterns
from protocols.loading import TensorSource

logger = logging.getLogger(__name__)

DESCRIPTION = f"a {NAME} transformer"
DIT_OPTION = "--dit"
RELEASED_FILES = (
    "transformer/480p_t2v/diffusion_pytorch_model.safetensors or another transformer of "
    "tencent/HunyuanVideo-1.5 that was not distilled, one of Comfy-Org such as "
    "hunyuanvideo1.5_720p_t2v_fp16.safetensors, or the folder transformer of a release for diffusers"
)
DIALECTS: Mapping[str, tuple[str, Names]] = {  # dialect -> a tensor that only it has, its names
    "released": ("double_blocks.0.img_attn_k.weight", ()),
    "ComfyUI": ("double_blocks.0.img_attn_qkv.weight", ()),
    "ComfyUI's network": ("double_blocks.0.img_attn.qkv.weight", COMFYUI_TENSORS),
    "diffusers": ("transformer_blocks.0.attn.add_q_proj.weight", tensor_patterns(HUNYUAN_VIDEO_15)),
}
FUSED_LAYERS = joined_tensors(HUNYUAN_VIDEO_15)
KIND_TENSORS = ("cond_type_embedding.weight", "cond_type_embed.weight")  # HunyuanImage-2.1 has none
# tensors of transformers that go from one noise level to another in a single pass
MEANFLOW_TENSORS = ("time_r_in.mlp.0.weight", "time_embed.timestep_embedder_r.linear_1.weight")
_DISTILLED_NAME = re.compile(r"distill|meanflow|lightx2v|(?<!\d)\d{1,2}[_-]?steps?(?![a-z])", re.IGNORECASE)
_SUPER_RESOLUTION_NAME = re.compile(r"(?:^|[_-])sr(?=[_.\s-])", re.IGNORECASE)


def _read_header(checkpoint: Checkpoint) -> DitHeader[HunyuanVideo15Config]:
    """Return the dimensions, layout and dtype of a file; raise CheckpointError for another model."""
    names = checkpoint.tensors
    dialect = find_dialect(DIALECTS, names)
    if dialect is None or not any(name in names for name in KIND_TENSORS):
        similar_model = hunyuan_video.describe(checkpoint)
        if similar_model is None:
            raise make_wrong_kind_error(checkpoint, DESCRIPTION, DIT_OPTION, RELEASED_FILES)
        raise _make_error(checkpoint, f"is not {DESCRIPTION}; it looks like {similar_model}")
    _refuse_distilled(checkpoint)
    identifying_tensor, patterns = DIALECTS[dialect]
    file_shapes = joined_shapes({name: info.shape for name, info in names.items()}, patterns)
    shapes = DitShapes(checkpoint.path, parted_shapes(file_shapes, FUSED_LAYERS), NAME)
    config = _read_config(checkpoint, shapes)
    return DitHeader(config, dialect, names[identifying_tensor].dtype)


def _refuse_distilled(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a transformer that was distilled, or that enlarges clips."""
    name = release_name(checkpoint.path)
    if any(tensor in checkpoint.tensors for tensor in MEANFLOW_TENSORS):
        raise _make_error(
            checkpoint,
            f"is a transformer of {NAME} distilled by MeanFlow (it has time_r_in), which is not supported",
        )
    found = _SUPER_RESOLUTION_NAME.search(name)
    if found is not None:
        raise _make_error(
            checkpoint,
            f"is named as a transformer of {NAME} that enlarges clips ({found[0].strip('_-')}), which is not "
            "supported",
        )
    found = _DISTILLED_NAME.search(name)
    if found is not None:
        raise _make_error(
            checkpoint,
            f"is named as a distilled transformer of {NAME} ({found[0]}), which is not supported: it runs "
            "without guidance or in few steps, and a LoRA would undo that",
        )


def _make_error(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path} {what}.\n  Pass {RELEASED_FILES} to {DIT_OPTION}.", checkpoint.path
    )


def _read_config(checkpoint: Checkpoint, shapes: DitShapes) -> HunyuanVideo15Config:
    """Return a transformer's dimensions; raise CheckpointError if they are not those of the model."""
    dim, in_dim, patch_size = shapes.patches("img_in.proj.weight")
    out_dim = shapes.get_shape("final_layer.linear.weight")[0]
    if patch_size != (1, 1, 1) or in_dim != IN_CHANNELS or out_dim != LATENT_CHANNELS:
        size = " x ".join(map(str, patch_size))
        raise _make_error(
            checkpoint,
            f"takes {in_dim} channels in patches of {size} and returns {out_dim}, but {DESCRIPTION} takes "
            f"{IN_CHANNELS} in patches of one latent pixel and returns {LATENT_CHANNELS}; one that enlarges "
            "clips is not supported",
        )
    first_width, glyph_dim = shapes.get_shape("byt5_in.fc1.weight")
    return HunyuanVideo15Config(
        dim=dim,
        in_dim=in_dim,
        out_dim=out_dim,
        glyph_dim=glyph_dim,
        glyph_hidden=(first_width, shapes.get_shape("byt5_in.fc2.weight")[0]),
        image_dim=shapes.get_shape("vision_in.proj.1.weight")[1],
        **hunyuan_video.read_block_dimensions(shapes, DIT, hunyuan_video.CONFIG_TENSORS, dim),
    )


def _make_sources(
    checkpoint: Checkpoint, header: DitHeader[HunyuanVideo15Config]
) -> Mapping[str, TensorSource]:
    swapped = swapped_tensors(HUNYUAN_VIDEO_15) if header.dialect == "diffusers" else ()
    joined = join_parts(list_tensor_sources(checkpoint), DIALECTS[header.dialect][1], swapped)
    return cut_parts(joined, FUSED_LAYERS)


FORMAT = DitFormat(
    _read_header, lambda _: DESCRIPTION, network=HunyuanVideo15Model, sources=_make_sources, option=DIT_OPTION
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@dataclass(frozen=True)
class HunyuanVideo15Files(QwenAndByt5Files):
    """Model files of a run: transformer, VAE, Qwen2.5-VL, ByT5 and, for clips from an image, SigLIP."""

    task: HunyuanVideo15Task = TASKS[T2V]
    image_encoder: Path | None = None

    format: ClassVar = FORMAT
    vae_folder: ClassVar[str] = "vae"
    language_settings: ClassVar = QWEN_SETTINGS
    glyph_encoder: ClassVar = QuotedTextEncoder
    writes_texts_in: ClassVar[str] = "video"

    def add_vae_options(self, options: HunyuanVideo15VaeOptions) -> "HunyuanVideo15Files":
        """Return a copy with the VAE's path and settings from `options`."""
        return replace(self.add_vae(options.file), vae_tile=options.tile)

    @property
    def dit_path(self) -> Path:
        """Return the transformer's path, or for a release folder its subfolder `transformer`."""
        return inside(super().dit_path, "transformer")

    @property
    def image_encoder_path(self) -> Path:
        """Return SigLIP's path; raise OptionError if --image_encoder is missing."""
        path = require_file(self.image_encoder, ENCODER_OPTION, "SigLIP encodes the first frame of a clip")
        return inside(path, "image_encoder")

    def load_vae(self, device: torch.device) -> HunyuanVideo15Vae:
        """Load the VAE in the dtype and tile size that the options set."""
        return load_vae(self.vae_path, device, self.encoder_dtype(self.vae_dtype), self.vae_tile)

    def load_image_encoder(self, device: torch.device) -> SiglipVision:
        """Load SigLIP's image tower."""
        return load_siglip(self.image_encoder_path, device, self.encoder_dtype(None))

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the VAE of this model."""
        read_once(self.vae_path, read_vae)

    def check(self, needed: Collection[str] = ()) -> None:
        """Check the files that are given or needed, including SigLIP's width. Loads nothing."""
        super().check(needed)
        if self.image_encoder is not None or "image_encoder" in needed:
            path = self.image_encoder_path
            dit_width = None if self.dit is None else self.dit_header().config.image_dim
            width = read_once(path, read_siglip_width)
            check_state_width(ENCODER_OPTION, path, width, self.dit, dit_width, FILES)


def select_task(name: str | None, dit: Path | None) -> HunyuanVideo15Task:
    """Return the task that --task names or the transformer's name suggests; warn if they differ.

    Args:
        name: Value of --task; None if it is not given.
        dit: Value of --dit; None if it is not given.
    """
    task = find_task(name, dit)
    label = release_name(dit).lower()
    if name is not None:
        for other, starts in ((T2V, "text alone"), (I2V, "an image")):
            if other in label and other != task.name:
                logger.warning(
                    "--task %s, but %s is named as a file that starts from %s: clips will be worse",
                    task.name,
                    dit,
                    starts,
                )
    elif dit is not None:
        evidence = "so" if T2V in label or I2V in label else "nothing else"
        logger.info("--task is %s: the name of %s says %s", task.name, dit, evidence)
    return task
