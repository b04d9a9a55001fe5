"""Transformer files of MiniMax-H3: released shards, single files, pruned files, diffusers' folders.

The rows of fused queries, keys and values exist in two orders, which have equal shapes. The release's shards
interleave them by head; all published single files stack them. The file's name decides, or --h3_qkv_layout.
diffusers stores them separately, with the halves of the feed-forward's first layer in the other order.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from checkpoints.dialects import (
    DitShapes,
    Names,
    join_parts,
    joined_shapes,
    make_wrong_kind_error,
    stack_heads,
)
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.encoders import declared_settings
from checkpoints.kinds import kind_by_name
from checkpoints.opening import Checkpoint, is_sharded, list_tensor_sources
from minimax_h3.configs import NUM_MODALITIES, PATCH, H3Config
from minimax_h3.model import MODULATION_VECTORS, H3Model
from minimax_h3.options import FREQUENCIES_KEY, LAYOUT_KEY
from modules.errors import CheckpointError
from protocols.loading import TensorSource

NAME = "MiniMax-H3"
MODEL_KIND = f"a {NAME} transformer"
OPTION = "--dit"
FILES = (
    "the first shard of transformer/ of MiniMaxAI/MiniMax-H3, minimax_h3_fl2va_*.safetensors or "
    "minimax_h3_ref2va_*.safetensors of Comfy-Org, or diffusers' folder transformer"
)
STACKED, INTERLEAVED, DIFFUSERS = "stacked", "interleaved", "diffusers"
HEAD_WIDTH = 128
AXES = 3  # axes of positions: time, height, width
DIFFUSERS_CLASS = "MiniMaxH3Transformer3DModel"
IDENTIFYING_TENSOR = "blocks.0.attn.qkv_proj.weight"
DIFFUSERS_TENSOR = "transformer_blocks.0.attn.to_q.weight"
_BLOCKS = (("token_refiner.refiner_blocks", "token_refiner.blocks"), ("transformer_blocks", "blocks"))
_LAYERS = (
    *((rf"attn\.to_{letter}\.weight", f"attn.qkv_proj.weight#{row}") for row, letter in enumerate("qkv")),
    (r"attn\.norm_([qk])\.weight", r"attn.\2_norm.weight"),
    (r"attn\.to_out\.0\.weight", "attn.out_proj.weight"),
    (r"ff\.net\.0\.proj\.weight", "mlp.fc1.weight"),
    (r"ff\.net\.2\.weight", "mlp.fc2.weight"),
    (r"(norm[12]|adaln_proj\.linear)\.(weight|bias)", r"\2.\3"),
)
_OUTSIDE = (
    ("proj_in", "video_patch_proj"),
    ("audio_proj_in", "audio_patch_proj"),
    ("context_embedder", "condition_proj"),
    ("time_embedder.linear_1", "time_embedder.proj_in"),
    ("time_embedder.linear_2", "time_embedder.proj_out"),
    ("norm_out.norm", "final_layer.norm"),
    ("norm_out.linear", "final_layer.adaln_proj.linear"),
    ("proj_out", "final_layer.video_out"),
    ("audio_proj_out", "final_layer.audio_out"),
)
TABLE: Names = (
    *(
        (rf"{re.escape(theirs)}\.(\d+)\.{layer}", rf"{ours}.\1.{our_layer}")
        for theirs, ours in _BLOCKS
        for layer, our_layer in _LAYERS
    ),
    *((rf"{re.escape(theirs)}\.(weight|bias)", rf"{ours}.\1") for theirs, ours in _OUTSIDE),
)
IGNORED = ("rope.inv_freq",)  # computed here instead


def find_layout(path: Path) -> str:
    """Return the row order of the fused matrix in a file with released names, according to its file name.

    `path` is a file, a first shard, an index or a folder; the last three count as shards.
    """
    return INTERLEAVED if is_sharded(path) else STACKED


def find_task(path: Path) -> str | None:
    """Return the task in a transformer's file name, "fl2va" (also for text to video) or "ref2va"; else None.

    The tensors do not show it. diffusers' folders are called transformer and transformer_ref.
    """
    folder = path if path.is_dir() else path.parent
    if folder.name == "transformer_ref":
        return "ref2va"
    match = re.search(r"fl2va|ref2va", path.name, re.IGNORECASE)
    return None if match is None else match[0].lower()


def read_header(checkpoint: Checkpoint, layout: str | None) -> DitHeader[H3Config]:
    """Return dimensions, dialect (tensor naming and row order) and dtype of a transformer file.

    `layout` is the row order of the fused query, key and value matrix, STACKED or INTERLEAVED; None decides
    by the file's name. A file trained here records STACKED. Raises CheckpointError for another model's file.
    """
    names = checkpoint.tensors
    dialect = _find_dialect(checkpoint, layout)
    if checkpoint.metadata.get(LAYOUT_KEY) is None:  # files trained here may have any name
        # Raise CheckpointError if the file name shows another model with the same tensors
        what = kind_by_name(checkpoint.path, is_sharded(checkpoint.path))
        if what is not None:
            raise CheckpointError(
                f"{checkpoint.path} is {what}, as its name says.\n"
                f"  Pass {FILES} to {OPTION}, or rename the file if it is one.",
                checkpoint.path,
            )
    tensor_shapes = {name: info.shape for name, info in names.items()}
    if dialect == DIFFUSERS:
        tensor_shapes = joined_shapes(tensor_shapes, TABLE)
    shapes = DitShapes(checkpoint.path, tensor_shapes, NAME)
    config = _read_config(shapes)
    # a file may record its number of rotary frequencies
    frequencies = _read_frequencies(checkpoint)
    if frequencies is not None:
        config = replace(config, frequencies=frequencies)
    # Raise CheckpointError if heads have fewer channels than the rotary embedding rotates
    turned = 2 * AXES * config.frequencies
    if not 0 < turned <= config.head_width:
        raise CheckpointError(
            f"{checkpoint.path}: {config.frequencies} frequencies for each of {AXES} axes need {turned} "
            "channels, "
            f"but heads have {config.head_width}. Pass the file with its config.json, or copy it again.",
            checkpoint.path,
        )
    identifying_tensor = DIFFUSERS_TENSOR if dialect == DIFFUSERS else IDENTIFYING_TENSOR
    return DitHeader(config, dialect, names[identifying_tensor].dtype)


def _find_dialect(checkpoint: Checkpoint, layout: str | None) -> str:
    """Return DIFFUSERS, or the row order of the fused matrix in a file with released names."""
    names = checkpoint.tensors
    has_released_names = "adaln_t_table" in names or "video_patch_proj.weight" in names
    if IDENTIFYING_TENSOR in names and has_released_names:
        is_trained = checkpoint.metadata.get(LAYOUT_KEY) == STACKED
        return STACKED if is_trained else layout or find_layout(checkpoint.path)
    if DIFFUSERS_TENSOR in names and "audio_proj_in.weight" in names:
        return DIFFUSERS
    raise make_wrong_kind_error(checkpoint, MODEL_KIND, OPTION, FILES)


def _read_frequencies(checkpoint: Checkpoint) -> int | None:
    """Return the recorded number of rotary frequencies per axis; None if none is recorded."""
    # A trained file has them in its metadata; otherwise they are read from the config.json next to the file.
    recorded = checkpoint.metadata.get(FREQUENCIES_KEY)
    if recorded is not None:
        if not re.fullmatch(r"[0-9]{1,4}", recorded):
            path, error = checkpoint.path, f"{FREQUENCIES_KEY} in its metadata is {recorded!r:.60}"
            raise CheckpointError(f"{path}: {error}. Copy the file again.", path)
        return int(recorded)
    path, settings = declared_settings(checkpoint, {DIFFUSERS_CLASS})
    frequencies = settings.get("rope_freq_dim")
    if frequencies is not None and type(frequencies) is not int:
        raise CheckpointError(f"{path}: 'rope_freq_dim' is {frequencies!r:.60}. Copy the file again.", path)
    return frequencies


def _read_config(shapes: DitShapes) -> H3Config:
    """Return the model's sizes from tensor shapes; a pruned file has a table instead of the time embedder."""
    _check_sizes_fit(shapes)
    (head_width,) = shapes.get_shape("blocks.0.attn.q_norm.weight", axes=1)
    dim, inner = shapes.get_shape("blocks.0.attn.out_proj.weight")
    is_pruned = "adaln_t_table" in shapes.shapes
    table_rows = shapes.get_shape("adaln_t_table")[0] if is_pruned else 0
    time_hidden, freq_dim = (0, 0) if is_pruned else shapes.get_shape("time_embedder.proj_in.weight")
    frequencies = H3Config.frequencies
    if "rope.inv_freq" in shapes.shapes:
        # a released file stores them; their number is read here
        (frequencies,) = shapes.get_shape("rope.inv_freq", axes=1)
    return H3Config(
        dim=dim,
        num_heads=inner // head_width,
        head_width=head_width,
        ffn_dim=shapes.get_shape("blocks.0.mlp.fc2.weight")[1],
        num_layers=shapes.count_blocks("blocks"),
        refiner_layers=shapes.count_blocks("token_refiner.blocks"),
        channels=shapes.get_shape("video_patch_proj.weight")[1] // PATCH**2,
        audio_channels=shapes.get_shape("audio_patch_proj.weight")[1],
        text_dim=shapes.get_shape("condition_proj.weight")[1],
        freq_dim=freq_dim,
        time_hidden=time_hidden,
        time_dim=shapes.get_shape("blocks.0.adaln_proj.linear.weight")[1],
        table_rows=table_rows,
        frequencies=frequencies,
    )


def _check_sizes_fit(shapes: DitShapes) -> None:
    """Raise CheckpointError if the sizes of a block's tensors or of patches contradict each other."""
    (head_width,) = shapes.get_shape("blocks.0.attn.q_norm.weight", axes=1)
    dim, inner = shapes.get_shape("blocks.0.attn.out_proj.weight")
    rows, _ = shapes.get_shape("blocks.0.attn.qkv_proj.weight")
    modulation, _ = shapes.get_shape("blocks.0.adaln_proj.linear.weight")
    patch = shapes.get_shape("video_patch_proj.weight")[1]
    fits = (
        inner % head_width == 0
        and rows == 3 * inner
        and modulation == NUM_MODALITIES * MODULATION_VECTORS * dim
    )
    if not fits or patch % PATCH**2:
        raise CheckpointError(
            f"{shapes.path}: {rows} rows of queries, keys and values, {inner} columns after them, heads of "
            f"{head_width}, {modulation} rows of modulation and patches of width {patch} do not fit "
            f"together. Copy the file again.",
            shapes.path,
        )


def _make_sources(checkpoint: Checkpoint, header: DitHeader[H3Config]) -> Mapping[str, TensorSource]:
    stored = list_tensor_sources(checkpoint)
    if header.dialect == DIFFUSERS:
        swapped = [name for name in join_parts(stored, TABLE) if name.endswith(".mlp.fc1.weight")]
        return join_parts(stored, TABLE, swapped)
    stacks = _make_stackers(checkpoint, header)
    return {
        name: source.with_step(stacks[name]) if name in stacks else source for name, source in stored.items()
    }


def _make_stackers(
    checkpoint: Checkpoint, header: DitHeader[H3Config]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return functions, by tensor name, that reorder rows interleaved by head into stacked q, k and v."""
    if header.dialect != INTERLEAVED:
        return {}
    stack = functools.partial(stack_heads, head_width=header.config.head_width)
    names = (name for name in checkpoint.tensors if name.endswith(".attn.qkv_proj.weight"))
    return dict.fromkeys(names, stack)


@functools.cache
def make_format(layout: str | None = None) -> DitFormat[H3Config, H3Model]:
    """Return the format of transformer files; `layout` is the row order of fused matrices, if it is known."""
    return DitFormat(
        functools.partial(read_header, layout=layout),
        lambda header: f"{MODEL_KIND}, pruned" if header.config.table_rows else MODEL_KIND,
        network=H3Model,
        sources=_make_sources,
        option=OPTION,
        ignore=IGNORED,
        single_file_row_orders=_make_stackers,
    )


FORMAT = make_format()
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load
