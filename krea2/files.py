"""Transformer files of Krea 2, and the files of a run: transformer, Qwen-Image's VAE and Qwen3-VL.

Files have the released names (ComfyUI's, too) or diffusers'. Raw and Turbo have equal tensors; see
`find_release`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from checkpoints.dialects import DitShapes, join_parts, joined_shapes, make_wrong_kind_error
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.files import judge_distillation
from encoders.language_encoder import LanguageEncoderSettings
from encoders.language_models import QWEN3_VL
from encoders.picture_prompts import ImagePromptFormat, read_within
from krea2.configs import FEW_STEPS, PATCH, STATES, Krea2Config, Krea2StreamConfig
from krea2.model import Krea2Model
from krea2.names import KREA_2
from krea2.options import NAME, TURBO, VARIANT_KEY, VARIANTS
from modules.errors import CheckpointError
from modules.text_files import iterate_lora_metadata, parse_json, read_text
from networks.names.layouts import tensor_patterns
from protocols.loading import TensorSource
from qwen_image.files import QWEN_SETTINGS, TOKENIZER, QwenImageFiles

KEY = "krea2_vl_embed"
BESIDE = (".", "qwen_3_vl", "tokenizer", "../tokenizer")
FROM = replace(TOKENIZER, repository="Qwen/Qwen3-VL-4B-Instruct", folders=BESIDE)
# the template is Qwen-Image's
KREA_2_SETTINGS = replace(
    QWEN_SETTINGS,
    states_key=KEY,
    model=QWEN3_VL,
    source=replace(QWEN_SETTINGS.source, files=FROM),
    max_length=512,  # including the template's tokens after the prompt, which remain if the prompt is cut off
    keeps_template_suffix=True,
    stacked_states=STATES,
)
MEGAPIXEL, SHOWN_AREA = 1024 * 1024, 384 * 384  # maximum area of a reference: for the VAE, and in a prompt
SHOWN = ImagePromptFormat(
    "Picture {number}: <|vision_start|>{tokens}<|vision_end|>",
    read=partial(read_within, area=SHOWN_AREA),
    min_pixels=256 * 256,
)
EDIT_SETTINGS = replace(KREA_2_SETTINGS, image_format=SHOWN)
# of a generation, most of which show none
MIXED_SETTINGS = replace(KREA_2_SETTINGS, image_format=replace(SHOWN, loads_tower_at_once=False))
MAX_REFERENCES = 10  # references
MODEL_KIND = f"a {NAME} transformer"
DIT_OPTION = "--dit"
FILES = (
    "raw.safetensors of krea/Krea-2-Raw, turbo.safetensors of krea/Krea-2-Turbo, the folder transformer of "
    "either, or krea2_raw_bf16.safetensors of Comfy-Org"
)
# dialect -> a tensor that only it has
DIALECTS = {"released": "txtfusion.projector.weight", "diffusers": "text_fusion.projector.weight"}
TEXT_BLOCKS = tuple((f"txtfusion.{name}_blocks", 2) for name in ("layerwise", "refiner"))
NAME_RULES = {"released": (), "diffusers": tensor_patterns(KREA_2)}


def _read_stream(shapes: DitShapes, start: str) -> Krea2StreamConfig:
    """Return the dimensions of one stream's blocks; raise CheckpointError if they do not match."""
    rows, dim = shapes.get_shape(f"{start}.0.attn.wq.weight")
    key_rows, _ = shapes.get_shape(f"{start}.0.attn.wk.weight")
    (head_width,) = shapes.get_shape(f"{start}.0.attn.qknorm.qnorm.scale", axes=1)
    heads, remainder = divmod(rows, head_width)
    kv_heads, key_remainder = divmod(key_rows, head_width)
    has_heads = rows == dim and not remainder and head_width % 16 == 0  # three axes rotate pairs of channels
    has_kv_heads = kv_heads > 0 and not key_remainder
    if not has_heads or not has_kv_heads or heads % kv_heads:
        raise CheckpointError(
            f"{shapes.path}: {rows} rows of queries and {key_rows} of keys in blocks of width {dim} with "
            f"heads of {head_width} do not fit {MODEL_KIND}. "
            "Copy the file again.",
            shapes.path,
        )
    ffn_dim = shapes.get_shape(f"{start}.0.mlp.gate.weight")[0]
    return Krea2StreamConfig(dim, ffn_dim, heads, kv_heads)


def _count_blocks(shapes: DitShapes, name: str, released: Iterable[tuple[str, int]]) -> int:
    """Return the number of blocks in a list; raise CheckpointError if there are fewer than in the release."""
    number = shapes.count_blocks(name)
    minimum = dict(released).get(name, 0)
    if number < minimum:
        raise CheckpointError(
            f"{shapes.path}: only {number} of {minimum} blocks of {name} exist. Pass the complete file.",
            shapes.path,
        )
    return number


def _read_header(checkpoint: Checkpoint) -> DitHeader[Krea2Config]:
    """Return dimensions, dialect (its tensor names) and dtype of a Krea 2 file."""
    names = checkpoint.tensors
    dialect = next((name for name, tensor in DIALECTS.items() if tensor in names), None)
    if dialect is None:
        raise make_wrong_kind_error(checkpoint, MODEL_KIND, DIT_OPTION, FILES)
    stored_shapes = {name: info.shape for name, info in names.items()}
    shapes = DitShapes(checkpoint.path, joined_shapes(stored_shapes, NAME_RULES[dialect]), NAME)
    query = "blocks.0.attn.wq.weight" if dialect == "released" else "transformer_blocks.0.attn.to_q.weight"
    return DitHeader(_read_config(shapes), dialect, names[query].dtype)


def _read_config(shapes: DitShapes) -> Krea2Config:
    """Return the dimensions of a transformer. Raises CheckpointError if they do not match each other."""
    blocks = _read_stream(shapes, "blocks")
    text = _read_stream(shapes, "txtfusion.layerwise_blocks")
    patch_width = shapes.get_shape("first.weight")[1]
    if patch_width % PATCH**2:
        raise CheckpointError(
            f"{shapes.path}: patches of width {patch_width} do not fit {MODEL_KIND}. Copy the file again.",
            shapes.path,
        )
    # blocks that the release has: a file that lacks some of them is refused
    released_blocks = dict(KREA_2.released_sizes).get(blocks.dim, ())
    return Krea2Config(
        dim=blocks.dim,
        ffn_dim=blocks.ffn_dim,
        num_heads=blocks.num_heads,
        num_kv_heads=blocks.num_kv_heads,
        text=text,
        num_layers=_count_blocks(shapes, "blocks", released_blocks),
        layerwise_blocks=_count_blocks(shapes, "txtfusion.layerwise_blocks", TEXT_BLOCKS),
        refiner_blocks=_count_blocks(shapes, "txtfusion.refiner_blocks", TEXT_BLOCKS),
        states=shapes.get_shape("txtfusion.projector.weight")[1],
        channels=patch_width // PATCH**2,
        freq_dim=shapes.get_shape("tmlp.0.weight")[1],
    )


def _make_sources(checkpoint: Checkpoint, header: DitHeader[Krea2Config]) -> Mapping[str, TensorSource]:
    sources = join_parts(list_tensor_sources(checkpoint), NAME_RULES[header.dialect])
    flat = [name for name in sources if re.fullmatch(r"blocks\.\d+\.mod\.lin", name)]
    # diffusers has a row for each of what modulates a block
    return sources | {name: sources[name].with_step(lambda rows: rows.flatten()) for name in flat}


# the last two are in files of the first days; no tool uses them
FORMAT = DitFormat(
    _read_header,
    lambda _: MODEL_KIND,
    network=Krea2Model,
    sources=_make_sources,
    option=DIT_OPTION,
    ignore=("last.down.weight", "last.up.weight"),
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


class Krea2Release(NamedTuple):
    """A Krea 2 release, and what shows that the transformer belongs to it."""

    is_turbo: bool  # False: raw
    source: str  # what says so


def find_release(dit: Path | None) -> Krea2Release | None:
    """Find out whether a transformer is Turbo or raw; return the evidence too, or None if nothing shows it.

    Sources in this order: the file's training metadata, the release's model_index.json, and the names of the
    file and its folders.
    """
    if dit is None:
        return None
    for _, metadata in iterate_lora_metadata([dit]):
        variant = metadata.get(VARIANT_KEY)
        if variant in VARIANTS:
            return Krea2Release(variant == TURBO, f"its {VARIANT_KEY} is {variant}")
    folder = dit.absolute().parent if dit.suffix else dit.absolute()
    index = folder.parent / "model_index.json"
    if folder.name == "transformer" and index.is_file():
        is_distilled = _read_is_distilled(index)
        if isinstance(is_distilled, bool):
            return Krea2Release(is_distilled, f"{index} has is_distilled {str(is_distilled).lower()}")
    evidence = judge_distillation(FEW_STEPS, dit)
    return None if evidence is None else Krea2Release(*evidence)


def _read_is_distilled(index: Path) -> Any:
    """Return the value `is_distilled` of a model_index.json; None without one."""
    try:
        return parse_json(read_text(index)).get("is_distilled")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}). Copy it again.", index) from error


@dataclass(frozen=True)
class Krea2Files(QwenImageFiles):
    """Model files of a run: the transformer, Qwen-Image's VAE and Qwen3-VL's language model."""

    encoder_settings: LanguageEncoderSettings = KREA_2_SETTINGS

    format: ClassVar = FORMAT
    called: ClassVar[str] = NAME
