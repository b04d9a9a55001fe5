"""Checkpoints of the HunyuanImage-2.1 transformer: kinds, dialects, and loading."""

from collections.abc import Mapping
from pathlib import Path

import hunyuan_model.checkpoints as hunyuan
from hunyuan_image.configs import DIT, LATENT, HunyuanImageConfig
from hunyuan_image.model import HunyuanImageModel
from modules.checkpoints.dialects import DitShapes, Names, join_parts, other_kind, translate_name
from modules.checkpoints.dits import DitFormat, DitHeader, bare_names
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.contract.loading import TensorSource
from modules.errors import CheckpointError
from networks.names.image import HUNYUAN_IMAGE
from networks.names.layouts import swapped_tensors, tensor_patterns
from networks.names.video import COMFYUI_TENSORS

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


def _sources(checkpoint: Checkpoint, header: DitHeader[HunyuanImageConfig]) -> Mapping[str, TensorSource]:
    swapped = swapped_tensors(HUNYUAN_IMAGE) if header.dialect == "diffusers" else ()
    return join_parts(plain_sources(checkpoint), DIALECTS[header.dialect][1], swapped)


FORMAT = DitFormat(_header, lambda _: WHAT, HunyuanImageModel, _sources)
read_dit_header, load_dit = FORMAT.read_header, FORMAT.load
