"""Checkpoints of the FramePack transformer: what a file is, and loading one."""

import logging
import math
from pathlib import Path

import torch

import hunyuan_model.checkpoints as hunyuan
from frame_pack.configs import FramePackConfig
from frame_pack.model import FramePackModel
from modules.checkpoints.dialects import DitShapes, other_kind
from modules.checkpoints.dits import DitHeader, bare_names, fill_dit, kept_dtype
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.contract.family import DitSpec
from modules.contract.loading import Placement
from modules.devices import dtype_name
from modules.errors import CheckpointError

logger = logging.getLogger(__name__)

DIT = DitSpec(
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    fp8_exclude=("norm",),  # also excludes the modulation layers, whose names contain it
    input_layers=("x_embedder", "clean_x_embedder", "context_embedder", "image_projection"),
    token_wise=hunyuan.DIT.token_wise,
    swap_counts=hunyuan.DIT.swap_counts,
    # because they compute in float32; under 1 % of the model
    keep_float32=("time_text_embed.", "context_embedder.time_text_embed.", "proj_out."),
)
# FramePack and FramePack-F1 have the same tensors, so their files cannot be told apart
WHAT = "a FramePack transformer"
FEED_FORWARD = "transformer_blocks.0.ff.net.0.proj.weight"
MARKS = (
    "clean_x_embedder.proj.weight",
    "image_projection.up.weight",
)  # tensors that HunyuanVideo does not have


def read_dit_header(checkpoint: Checkpoint) -> DitHeader[FramePackConfig]:
    """Read dimensions and dtype of an open file. Raises CheckpointError if it is no FramePack transformer."""
    return _header(bare_names(checkpoint))


def identify(path: Path) -> str | None:
    """Describe a file that is a transformer of this family; return None if it is not."""
    try:
        with open_checkpoint(path) as checkpoint:
            _header(bare_names(checkpoint))
            return f"it is {WHAT} (--dit)"
    except CheckpointError:
        return None


def load_dit(path: Path, placement: Placement) -> FramePackModel:
    """Load a transformer tensor by tensor to its device and dtype, in eval mode, without gradients.

    path: a safetensors file, or a folder of shards or its index. dtype: see
    `modules.checkpoints.dits.kept_dtype` and `fill_dit`. The embeddings of timestep, guidance and pooled text
    and the last layer are kept in float32. `placement.patch` is called with the published parameter names.
    Raises CheckpointError if the file is not such a transformer, is incomplete, or has unknown tensors.
    """
    with open_checkpoint(path) as opened:
        checkpoint = bare_names(opened)
        header = _header(checkpoint)
        config, target = header.config, kept_dtype(header.block_dtype, placement)
        blocks = f"{config.double_blocks} + {config.single_blocks} blocks of width {config.dim}"
        logger.info("Loading %s: %s, %s, as %s", path, WHAT, blocks, dtype_name(target))
        with torch.device("meta"):
            dit = FramePackModel(config, placement.attention)
        fill_dit(dit, checkpoint, plain_sources(checkpoint), placement, target, DIT, WHAT)
    return dit


def _header(checkpoint: Checkpoint) -> DitHeader[FramePackConfig]:
    path, names = checkpoint.path, checkpoint.tensors
    if not any(mark in names for mark in MARKS):
        files = (
            "the transformer's checkpoint, such as the folder of FramePackI2V_HY or "
            "FramePackI2V_HY_bf16.safetensors,"
        )
        relative = hunyuan.describe(checkpoint)
        if relative is None:
            raise other_kind(checkpoint, WHAT, "--dit", files)
        raise CheckpointError(
            f"{path} is not {WHAT}; it looks like {relative}.\n  Give {files} to --dit.", path
        )
    config = _config(DitShapes(path, {name: info.shape for name, info in names.items()}, "FramePack"))
    return DitHeader(config, "official", names[FEED_FORWARD].dtype)


def _config(found: DitShapes) -> FramePackConfig:
    dim, in_dim, patch_size = found.patches("x_embedder.proj.weight")
    (head_width,) = found.of("transformer_blocks.0.attn.norm_q.weight", axes=1)
    hunyuan.check_heads(found.path, dim, head_width, "FramePack")
    refiner = "context_embedder.token_refiner.refiner_blocks"
    image_hidden_dim, image_dim = found.of("image_projection.up.weight")
    return FramePackConfig(
        dim=dim,
        ffn_dim=found.of(FEED_FORWARD)[0],
        num_heads=dim // head_width,
        double_blocks=found.blocks("transformer_blocks"),
        single_blocks=found.blocks("single_transformer_blocks"),
        refiner_blocks=found.blocks(refiner),
        refiner_ffn_dim=found.of(f"{refiner}.0.ff.net.0.proj.weight")[0],
        in_dim=in_dim,
        out_dim=found.of("proj_out.weight")[0] // math.prod(patch_size),
        text_dim=found.of("context_embedder.proj_in.weight")[1],
        pooled_dim=found.of("time_text_embed.text_embedder.linear_1.weight")[1],
        image_dim=image_dim,
        image_hidden_dim=image_hidden_dim,
        freq_dim=found.of("time_text_embed.timestep_embedder.linear_1.weight")[1],
        patch_size=patch_size,
    )
