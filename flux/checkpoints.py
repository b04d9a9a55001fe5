"""Checkpoints of the FLUX.1 and Chroma transformers: as published, and as diffusers writes them."""

from collections.abc import Mapping
from typing import Any

from flux.configs import CHROMA, DEV, PATCH, SCHNELL, ApproximatorConfig, FluxConfig
from flux.model import FluxModel
from modules.checkpoints.dialects import DitShapes, Names, count, join_parts, joined_shapes, other_kind
from modules.checkpoints.dits import DitFormat, DitHeader
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.contract.loading import TensorSource
from modules.errors import CheckpointError
from networks.names.image import FLUX
from networks.names.layouts import tensor_patterns

WHAT = "a FLUX.1 or Chroma transformer"
NAMES = {
    DEV: "a FLUX.1 dev transformer",
    SCHNELL: "a FLUX.1 schnell transformer",
    CHROMA: "a Chroma transformer",
}
FILES = (
    "flux1-dev.safetensors, flux1-schnell.safetensors, Chroma1-HD.safetensors, or the folder transformer of "
    "a diffusers pipeline"
)
OPTION = "--dit (--pretrained_model_name_or_path)"
# dialect -> a tensor that only it has, its names
DIALECTS: dict[str, tuple[str, Names]] = {
    "official": ("double_blocks.0.img_attn.qkv.weight", ()),
    "diffusers": ("transformer_blocks.0.attn.to_q.weight", tensor_patterns(FLUX)),
}
SWAPPED = ("final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias")
APPROXIMATOR = "distilled_guidance_layer"
# of relatives whose blocks have the same names in one of the layouts
OTHERS = (
    "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
    "byt5_in.fc1.weight",
    "double_stream_modulation_img.lin.weight",  # of FLUX.2
    "double_stream_modulation_img.linear.weight",
)
HEAD_MULTIPLE = 16  # a head's width divides into whole pairs for frames, rows and columns


def _header(checkpoint: Checkpoint) -> DitHeader[FluxConfig]:
    names = checkpoint.tensors
    dialect = next((name for name, (mark, _) in DIALECTS.items() if mark in names), "official")
    mark, table = DIALECTS[dialect]
    shapes = joined_shapes({name: info.shape for name, info in names.items()}, table)
    if mark not in names or len(shapes.get("img_in.weight", ())) != 2 or any(one in names for one in OTHERS):
        raise other_kind(checkpoint, WHAT, OPTION, FILES)
    return DitHeader(_config(DitShapes(checkpoint.path, shapes, "FLUX.1")), dialect, names[mark].dtype)


def _config(found: DitShapes) -> FluxConfig:
    dim, token_dim = found.of("img_in.weight")
    (head_width,) = found.of("double_blocks.0.img_attn.norm.query_norm.scale", axes=1)
    if dim % head_width or head_width % HEAD_MULTIPLE or token_dim % PATCH**2:
        raise CheckpointError(
            f"{found.path}: width {dim}, heads of {head_width} and tokens of {token_dim} numbers are not "
            "those of a FLUX.1 transformer. Copy the file again.",
            found.path,
        )
    is_chroma = f"{APPROXIMATOR}.in_proj.weight" in found.shapes
    sizes: dict[str, Any] = {
        "dim": dim,
        "ffn_dim": found.of("double_blocks.0.img_mlp.0.weight")[0],
        "num_heads": dim // head_width,
        "double_blocks": found.blocks("double_blocks"),
        "single_blocks": found.blocks("single_blocks"),
        "token_dim": token_dim,
        "text_dim": found.of("txt_in.weight")[1],
    }
    if is_chroma:
        return FluxConfig(**sizes, approximator=_approximator(found))
    return FluxConfig(
        **sizes,
        pooled_dim=found.of("vector_in.in_layer.weight")[1],
        freq_dim=found.of("time_in.in_layer.weight")[1],
        has_guidance="guidance_in.in_layer.weight" in found.shapes,
    )


def _approximator(found: DitShapes) -> ApproximatorConfig:
    dim, in_dim = found.of(f"{APPROXIMATOR}.in_proj.weight")
    layers = count(found.shapes, rf"{APPROXIMATOR}\.layers\.\d+")
    if in_dim % 8:
        raise CheckpointError(
            f"{found.path}: an approximator of {in_dim} inputs is not Chroma's. Copy the file again.",
            found.path,
        )
    return ApproximatorConfig(in_dim, dim, layers)


def _sources(checkpoint: Checkpoint, header: DitHeader[FluxConfig]) -> Mapping[str, TensorSource]:
    swapped = SWAPPED if header.dialect == "diffusers" else ()
    return join_parts(plain_sources(checkpoint), DIALECTS[header.dialect][1], swapped)


FORMAT = DitFormat(_header, lambda header: NAMES[header.kind], FluxModel, _sources, OPTION)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load
