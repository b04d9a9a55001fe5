"""Checkpoints of the Z-Image transformer: the released names, which diffusers has too, and ComfyUI's."""

from collections.abc import Mapping

from checkpoints import dialects
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.autoencoder import FLUX_KIND
from modules.errors import CheckpointError
from networks.names.layouts import joined_tensors, tensor_patterns
from protocols.loading import TensorSource
from z_image.configs import PATCH, ZImageConfig
from z_image.model import PATCH_KEY, ZImageModel
from z_image.names import Z_IMAGE
from z_image.options import NAME

MODEL_LABEL = f"a {NAME} transformer"
DIT_OPTION = "--dit"
RELEASED_FILES = (
    "z_image_turbo_bf16.safetensors, z_image_bf16.safetensors, or the folder transformer of "
    "Tongyi-MAI/Z-Image or Tongyi-MAI/Z-Image-Turbo"
)
IDENTIFYING_TENSOR = "cap_pad_token"  # Lumina-Image-2.0 has none
UNSUPPORTED_PREFIXES = ("siglip_", "control_")  # tensors of Z-Image-Omni and of ControlNets
# dialect -> a tensor that only it has
DIALECTS = {"released": "layers.0.attention.to_q.weight", "comfy": "layers.0.attention.qkv.weight"}
JOINED_TENSORS, COMFY_NAMES = joined_tensors(Z_IMAGE), tensor_patterns(Z_IMAGE)


def _our_name(name: str) -> str:
    return dialects.translate_name(name, COMFY_NAMES)


def _read_header(checkpoint: Checkpoint) -> DitHeader[ZImageConfig]:
    names = checkpoint.tensors
    known_dialects = (name for name, identifying_tensor in DIALECTS.items() if identifying_tensor in names)
    dialect = next(known_dialects, None)
    is_unsupported = any(name.startswith(UNSUPPORTED_PREFIXES) for name in names)
    if dialect is None or IDENTIFYING_TENSOR not in names or is_unsupported:
        raise dialects.make_wrong_kind_error(checkpoint, MODEL_LABEL, DIT_OPTION, RELEASED_FILES)
    file_shapes = {_our_name(name): info.shape for name, info in names.items()}
    shapes = dialects.DitShapes(checkpoint.path, dialects.parted_shapes(file_shapes, JOINED_TENSORS), NAME)
    return DitHeader(_read_config(shapes), dialect, names[DIALECTS[dialect]].dtype)


def _read_config(shapes: dialects.DitShapes) -> ZImageConfig:
    """Return the dimensions of a Z-Image transformer; raise CheckpointError for another model."""
    dim, patch_width = shapes.get_shape(f"all_x_embedder.{PATCH_KEY}.weight")
    (head_width,) = shapes.get_shape("layers.0.attention.norm_q.weight", axes=1)
    hidden, freq_dim = shapes.get_shape("t_embedder.mlp.0.weight")
    rows, columns = shapes.get_shape("layers.0.attention.to_q.weight")
    has_even_heads = dim % head_width == 0 and head_width % 16 == 0  # three axes rotate pairs of channels
    if rows != dim or columns != dim or not has_even_heads or patch_width % PATCH**2:
        raise CheckpointError(
            f"{shapes.path}: width {dim}, {rows} rows of queries, heads of {head_width} and patches of "
            f"width {patch_width} do not fit {MODEL_LABEL}. Copy the file again.",
            shapes.path,
        )
    channels = patch_width // PATCH**2
    if channels != FLUX_KIND.channels:
        raise CheckpointError(
            f"{shapes.path} takes {channels} channels, {MODEL_LABEL} {FLUX_KIND.channels}: it is a "
            f"relative such as Zeta-Chroma or L2P, which are not supported. Pass {RELEASED_FILES}.",
            shapes.path,
        )
    return ZImageConfig(
        dim=dim,
        ffn_dim=shapes.get_shape("layers.0.feed_forward.w1.weight")[0],
        num_heads=dim // head_width,
        num_kv_heads=dim // head_width,
        num_layers=shapes.count_blocks("layers"),
        noise_refiner_layers=shapes.count_blocks("noise_refiner"),
        context_refiner_layers=shapes.count_blocks("context_refiner"),
        in_dim=channels,
        text_dim=shapes.get_shape("cap_embedder.1.weight")[1],
        time_dim=shapes.get_shape("t_embedder.mlp.2.weight")[0],
        time_hidden=hidden,
        freq_dim=freq_dim,
    )


def _make_sources(checkpoint: Checkpoint, _: DitHeader[ZImageConfig]) -> Mapping[str, TensorSource]:
    return dialects.cut_parts(
        dialects.rename_sources(list_tensor_sources(checkpoint), _our_name), JOINED_TENSORS
    )


# the last is in some community files; the model does not use it
FORMAT = DitFormat(
    _read_header,
    lambda _: MODEL_LABEL,
    network=ZImageModel,
    sources=_make_sources,
    option=DIT_OPTION,
    ignore=("norm_final.weight",),
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load
