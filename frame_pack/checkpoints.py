"""Checkpoints of the FramePack transformer: recognise and load them."""

import hunyuan_model.checkpoints as hunyuan
from frame_pack.configs import DIT, FramePackConfig
from frame_pack.model import FramePackModel
from modules.checkpoints.dialects import DitShapes, other_kind
from modules.checkpoints.dits import DitFormat, DitHeader, own_names
from modules.checkpoints.opening import Checkpoint
from modules.errors import CheckpointError

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


FORMAT = DitFormat(_header, lambda _: WHAT, FramePackModel, own_names)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load
