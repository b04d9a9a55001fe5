"""Checkpoints of the FLUX.2 transformers: as published, and as diffusers writes them."""

from collections.abc import Mapping

from flux_2.configs import AXES, Flux2Config
from flux_2.model import Flux2Model
from flux_2.options import NAME
from modules.checkpoints.dialects import DitShapes, Names, join_parts, joined_shapes, other_kind
from modules.checkpoints.dits import DitFormat, DitHeader
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.contract.loading import TensorSource
from modules.errors import CheckpointError
from networks.names.image import FLUX_2
from networks.names.layouts import swapped_tensors, tensor_patterns

WHAT = f"a {NAME} transformer"
FILES = (
    "flux2-dev.safetensors, flux-2-klein-base-4b.safetensors, or the folder transformer of its release in "
    "diffusers layout"
)
OPTION = "--dit"
# dialect -> a tensor that only it has, its names
DIALECTS: dict[str, tuple[str, Names]] = {
    "official": ("double_stream_modulation_img.lin.weight", ()),
    "diffusers": ("double_stream_modulation_img.linear.weight", tensor_patterns(FLUX_2)),
}
HEADS = "double_blocks.0.img_attn.norm.query_norm.scale"


def _header(checkpoint: Checkpoint) -> DitHeader[Flux2Config]:
    names = checkpoint.tensors
    dialect = next((name for name, (mark, _) in DIALECTS.items() if mark in names), None)
    if dialect is None:
        raise other_kind(checkpoint, WHAT, OPTION, FILES)
    known = joined_shapes({name: info.shape for name, info in names.items()}, DIALECTS[dialect][1])
    shapes = DitShapes(checkpoint.path, known, NAME)
    dim, channels = shapes.of("img_in.weight")
    (width,) = shapes.of(HEADS, axes=1)
    ffn_dim = shapes.of("double_blocks.0.img_mlp.2.weight")[1]
    if dim % width or width % (2 * AXES) or shapes.of("double_blocks.0.img_mlp.0.weight")[0] != 2 * ffn_dim:
        raise CheckpointError(
            f"{checkpoint.path}: width {dim}, heads of {width} and feed-forwards of {ffn_dim} are not those "
            f"of {WHAT}. Copy the file again.",
            checkpoint.path,
        )
    config = Flux2Config(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=dim // width,
        double_blocks=shapes.blocks("double_blocks"),
        single_blocks=shapes.blocks("single_blocks"),
        channels=channels,
        text_dim=shapes.of("txt_in.weight")[1],
        freq_dim=shapes.of("time_in.in_layer.weight")[1],
        has_guidance="guidance_in.in_layer.weight" in known,
    )
    block = next(name for name in names if name.endswith(("img_mlp.0.weight", ".0.ff.linear_in.weight")))
    return DitHeader(config, dialect, names[block].dtype)


def _sources(checkpoint: Checkpoint, header: DitHeader[Flux2Config]) -> Mapping[str, TensorSource]:
    swapped = swapped_tensors(FLUX_2) if header.dialect == "diffusers" else ()
    return join_parts(plain_sources(checkpoint), DIALECTS[header.dialect][1], swapped)


def describe(header: DitHeader[Flux2Config]) -> str:
    """Return how messages call a transformer: dev, or klein and its width."""
    return f"a {NAME} dev transformer" if header.config.has_guidance else f"a {NAME} klein transformer"


FORMAT = DitFormat(_header, describe, Flux2Model, _sources, OPTION)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load
