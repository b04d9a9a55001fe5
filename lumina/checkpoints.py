"""Checkpoints of the Lumina-Image-2.0 transformer: as published, in diffusers' layout, all-in-one files."""

import logging
from pathlib import Path

import torch

from lumina.configs import LuminaConfig
from lumina.model import LuminaModel
from lumina.spec import DIT
from modules.checkpoints.dialects import DitShapes, Names, join_parts, joined_shapes, other_kind
from modules.checkpoints.dits import DitHeader, bare_names, choose_dtype, fill_dit
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.contract.loading import Placement
from modules.devices import dtype_name
from modules.errors import CheckpointError
from networks.names.layouts import tensor_patterns
from networks.names.lumina import LUMINA

logger = logging.getLogger(__name__)

WHAT = "a Lumina-Image-2.0 transformer"
FILES = (
    "lumina_2_model_bf16.safetensors, the folder transformer of Alpha-VLLM/Lumina-Image-2.0, or an "
    "all-in-one file such as Neta Lumina's"
)
OPTION = "--pretrained_model_name_or_path"
PATCH = 2
# dialect -> a tensor that only it has, its names
DIALECTS: dict[str, tuple[str, Names]] = {
    "official": ("layers.0.attention.qkv.weight", ()),
    "diffusers": ("layers.0.attn.to_q.weight", tensor_patterns(LUMINA)),
}
MARK = "cap_embedder.1.weight"  # of Lumina-Image-2.0, in published names
UNUSED = "norm_final.weight"  # in the published files; the model does not use it


def read_dit_header(checkpoint: Checkpoint) -> DitHeader[LuminaConfig]:
    """Read dimensions, dialect and dtype of an open file.

    Raises CheckpointError if the file is not a supported transformer.
    """
    return _header(bare_names(checkpoint))


def identify(path: Path) -> str | None:
    """Describe a file that is a transformer of this family; return None if it is not."""
    try:
        with open_checkpoint(path) as checkpoint:
            _header(bare_names(checkpoint))
    except CheckpointError:
        return None
    return f"it is {WHAT} ({OPTION})"


def load_dit(path: Path, placement: Placement) -> LuminaModel:
    """Load a transformer tensor by tensor to its device and dtype, in eval mode, without gradients.

    dtype: see `modules.checkpoints.dits.choose_dtype` and `fill_dit`. The embedding of time is kept in
    float32. `placement.patch` is called with the published parameter names. Raises CheckpointError if the
    file is not such a transformer, is incomplete, or has unknown tensors.
    """
    with open_checkpoint(path) as opened:
        checkpoint = bare_names(opened)
        header = _header(checkpoint)
        config = header.config
        target = choose_dtype(header.block_dtype, placement)
        size = f"{config.num_layers} layers of width {config.dim}"
        logger.info("Loading %s: Lumina-Image-2.0, %s, as %s", path, size, dtype_name(target))
        with torch.device("meta"):
            dit = LuminaModel(config, placement.attention)
        sources = join_parts(plain_sources(checkpoint), DIALECTS[header.dialect][1])
        fill_dit(dit, checkpoint, sources, placement, target, DIT, WHAT, (UNUSED,))
    return dit


def _header(checkpoint: Checkpoint) -> DitHeader[LuminaConfig]:
    names = checkpoint.tensors
    dialect = next((name for name, (mark, _) in DIALECTS.items() if mark in names), "official")
    mark, table = DIALECTS[dialect]
    shapes = joined_shapes({name: info.shape for name, info in names.items()}, table)
    if mark not in names or MARK not in shapes:
        raise other_kind(checkpoint, WHAT, OPTION, FILES)
    return DitHeader(
        _config(DitShapes(checkpoint.path, shapes, "Lumina-Image-2.0")), dialect, names[mark].dtype
    )


def _config(found: DitShapes) -> LuminaConfig:
    dim, patch_width = found.of("x_embedder.weight")
    (head_width,) = found.of("layers.0.attention.q_norm.weight", axes=1)
    rows = found.of("layers.0.attention.qkv.weight")[0]
    time_dim, freq_dim = found.of("t_embedder.mlp.0.weight")
    kv_rows = rows - dim
    if dim % head_width or head_width % 6 or kv_rows <= 0 or kv_rows % (2 * head_width):
        raise CheckpointError(
            f"{found.path}: width {dim}, heads of {head_width} and {rows} rows of queries, keys and values "
            "are not those of a Lumina-Image-2.0 transformer. Copy the file again.",
            found.path,
        )
    num_heads, num_kv_heads = dim // head_width, kv_rows // (2 * head_width)
    if num_heads % num_kv_heads or patch_width % PATCH**2:
        raise CheckpointError(
            f"{found.path}: {num_heads} heads of queries and {num_kv_heads} of keys, patches of "
            f"{patch_width} numbers are not those of a Lumina-Image-2.0 transformer. Copy the file again.",
            found.path,
        )
    return LuminaConfig(
        dim=dim,
        ffn_dim=found.of("layers.0.feed_forward.w1.weight")[0],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_layers=found.blocks("layers"),
        noise_refiner_layers=found.blocks("noise_refiner"),
        context_refiner_layers=found.blocks("context_refiner"),
        in_dim=patch_width // PATCH**2,
        text_dim=found.of(MARK)[1],
        time_dim=time_dim,
        freq_dim=freq_dim,
    )
