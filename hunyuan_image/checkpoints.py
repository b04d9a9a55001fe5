"""Checkpoints of the HunyuanImage-2.1 transformer: what a file is, its dialects, and loading one."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

import hunyuan_model.checkpoints as hunyuan
from hunyuan_image.configs import HunyuanImageConfig
from hunyuan_image.model import HunyuanImageModel
from hunyuan_image.spec import DIT, LATENT
from modules.checkpoints.dialects import DitShapes, Names, join_parts, other_kind, translate_name
from modules.checkpoints.dits import DitHeader, bare_names, choose_dtype, fill_dit
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.contract.loading import Placement
from modules.devices import dtype_name
from modules.errors import CheckpointError
from networks.names.hunyuan import COMFYUI_TENSORS
from networks.names.hunyuan_image import HUNYUAN_IMAGE
from networks.names.layouts import swapped_tensors, tensor_patterns

logger = logging.getLogger(__name__)

WHAT = "a HunyuanImage-2.1 transformer"
RELEASE = "dit/hunyuanimage2.1.safetensors of tencent/HunyuanImage-2.1 or hunyuanimage2.1_bf16.safetensors"
OPTION = "--dit"
DIALECTS: Mapping[str, tuple[str, Names]] = {  # dialect -> a tensor that only it has, its names
    "official": ("double_blocks.0.img_attn_qkv.weight", ()),
    "ComfyUI": ("double_blocks.0.img_attn.qkv.weight", COMFYUI_TENSORS),
    "diffusers": ("transformer_blocks.0.attn.add_q_proj.weight", tensor_patterns(HUNYUAN_IMAGE)),
}
# tensors of this model that HunyuanVideo does not have, in the three dialects
MARKS = ("byt5_in.fc1.weight", "context_embedder_2.linear_1.weight")
# tensors of the distilled model, which goes from one noise level to another in a single pass
DISTILLED = (
    "time_r_in.mlp.0.weight",
    "time_r_in.in_layer.weight",
    "time_guidance_embed.timestep_embedder_r.linear_1.weight",
    "guidance_in.mlp.0.weight",
    "guidance_in.in_layer.weight",
    "time_guidance_embed.guidance_embedder.linear_1.weight",
)
DIMENSIONS = hunyuan.DIMENSIONS  # of blocks and refiner, whose names are HunyuanVideo's


def read_dit_header(checkpoint: Checkpoint) -> DitHeader[HunyuanImageConfig]:
    """Read dimensions, dialect and dtype of an open file.

    Raises CheckpointError if it is no HunyuanImage transformer, or the distilled one.
    """
    return _header(bare_names(checkpoint))


def identify(path: Path) -> str | None:
    """Describe a file that is a transformer of this family; return None if it is not."""
    try:
        with open_checkpoint(path) as opened:
            checkpoint = bare_names(opened)
            if not any(mark in checkpoint.tensors for mark in MARKS):
                return None
            kind = "the distilled HunyuanImage-2.1 transformer, which is not supported"
            return f"it is {kind}" if _is_distilled(checkpoint) else f"it is {WHAT} ({OPTION})"
    except CheckpointError:
        return None


def load_dit(path: Path, placement: Placement) -> HunyuanImageModel:
    """Load a transformer tensor by tensor to its device and dtype, in eval mode, without gradients.

    dtype: see `modules.checkpoints.dits.choose_dtype` and `fill_dit`. The embeddings of the timestep and of
    the text's mean are kept in float32. `placement.patch` is called with the published parameter names.
    Raises CheckpointError if the file is not such a transformer, is incomplete, or has unknown tensors.
    """
    with open_checkpoint(path) as opened:
        checkpoint = bare_names(opened)
        header = _header(checkpoint)
        config, target = header.config, choose_dtype(header.block_dtype, placement)
        blocks = f"{config.double_blocks} + {config.single_blocks} blocks of width {config.dim}"
        logger.info("Loading %s: %s, %s, as %s", path, WHAT, blocks, dtype_name(target))
        with torch.device("meta"):
            dit = HunyuanImageModel(config, placement.attention)
        swapped = swapped_tensors(HUNYUAN_IMAGE) if header.dialect == "diffusers" else ()
        sources = join_parts(plain_sources(checkpoint), DIALECTS[header.dialect][1], swapped)
        fill_dit(dit, checkpoint, sources, placement, target, DIT, WHAT)
    return dit


def _is_distilled(checkpoint: Checkpoint) -> bool:
    return any(name in checkpoint.tensors for name in DISTILLED)


def _header(checkpoint: Checkpoint) -> DitHeader[HunyuanImageConfig]:
    path, names = checkpoint.path, checkpoint.tensors
    dialect = next((name for name, (mark, _) in DIALECTS.items() if mark in names), None)
    if dialect is None or not any(mark in names for mark in MARKS):
        relative = hunyuan.describe(checkpoint)
        if relative is None:
            raise other_kind(checkpoint, WHAT, OPTION, RELEASE)
        raise CheckpointError(
            f"{path} is not {WHAT}; it looks like {relative}.\n  Give {RELEASE} to {OPTION}.", path
        )
    if _is_distilled(checkpoint):
        raise CheckpointError(
            f"{path} is the distilled HunyuanImage-2.1 transformer (it has guidance_in or time_r_in), which "
            f"is not supported.\n  Give {RELEASE} to {OPTION}.",
            path,
        )
    mark, table = DIALECTS[dialect]
    shapes = {translate_name(name, table): info.shape for name, info in names.items()}
    return DitHeader(_config(DitShapes(path, shapes, "HunyuanImage-2.1")), dialect, names[mark].dtype)


def _config(found: DitShapes) -> HunyuanImageConfig:
    dim, in_dim, rows, columns = found.of("img_in.proj.weight", axes=4)
    if (rows, columns) != (1, 1):
        raise CheckpointError(
            f"{found.path} has patches of {rows} x {columns}; {WHAT} has patches of one latent pixel.\n"
            f"  Give {RELEASE} to {OPTION}.",
            found.path,
        )
    if in_dim != LATENT.channels:
        raise CheckpointError(
            f"{found.path} takes {in_dim} latent channels, {WHAT} takes {LATENT.channels}.\n"
            f"  Give {RELEASE} to {OPTION}.",
            found.path,
        )
    first, glyph_dim = found.of("byt5_in.fc1.weight")
    return HunyuanImageConfig(
        dim=dim,
        in_dim=in_dim,
        out_dim=found.of("final_layer.linear.weight")[0],
        glyph_dim=glyph_dim,
        glyph_hidden=(first, found.of("byt5_in.fc2.weight")[0]),
        **hunyuan.read_block_dimensions(found, DIT, DIMENSIONS, dim),
    )
