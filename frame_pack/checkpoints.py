"""Checkpoints of the FramePack transformer: what a file is, and loading one."""

import logging
from pathlib import Path

import torch

import hunyuan_model.checkpoints as hunyuan
from frame_pack.configs import FramePackConfig
from frame_pack.model import FramePackModel
from frame_pack.spec import DIT
from modules.checkpoints.dialects import DitShapes, other_kind
from modules.checkpoints.dits import DitHeader, bare_names, choose_dtype, fill_dit
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.contract.loading import Placement
from modules.devices import dtype_name
from modules.errors import CheckpointError

logger = logging.getLogger(__name__)

# FramePack and FramePack-F1 have the same tensors, so their files cannot be told apart
WHAT = "a FramePack transformer"
FEED_FORWARD = "transformer_blocks.0.ff.net.0.proj.weight"
DIMENSIONS = {  # for `hunyuan.read_dimensions`
    "in_dim": "x_embedder.proj.weight",
    "num_heads": "transformer_blocks.0.attn.norm_q.weight",
    "ffn_dim": FEED_FORWARD,
    "refiner_blocks": "context_embedder.token_refiner.refiner_blocks",
    "refiner_ffn_dim": "context_embedder.token_refiner.refiner_blocks.0.ff.net.0.proj.weight",
    "text_dim": "context_embedder.proj_in.weight",
    "pooled_dim": "time_text_embed.text_embedder.linear_1.weight",
    "freq_dim": "time_text_embed.timestep_embedder.linear_1.weight",
    "out_dim": "proj_out.weight",
}
MARKS = ("clean_x_embedder.proj.weight", "image_projection.up.weight")  # what HunyuanVideo does not have


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
    `modules.checkpoints.dits.choose_dtype` and `fill_dit`. The embeddings of timestep, guidance and pooled
    text and the last layer are kept in float32. `placement.patch` is called with the published parameter
    names. Raises CheckpointError if the file is not such a transformer, is incomplete, or has unknown
    tensors.
    """
    with open_checkpoint(path) as opened:
        checkpoint = bare_names(opened)
        header = _header(checkpoint)
        config, target = header.config, choose_dtype(header.block_dtype, placement)
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
    shared = hunyuan.read_dimensions(found, DIT, DIMENSIONS)
    image_hidden_dim, image_dim = found.of("image_projection.up.weight")
    return FramePackConfig(**shared, image_dim=image_dim, image_hidden_dim=image_hidden_dim)
