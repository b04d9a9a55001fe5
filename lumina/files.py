"""Files of a Lumina-Image-2.0 run: paths, and the check that each fits its option.

Transformers are as published, in diffusers' layout, or in all-in-one files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from checkpoints.dialects import DitShapes, Names, join_parts, joined_shapes, make_wrong_kind_error
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.encoders import check_state_width
from checkpoints.model_files import read_once, require_file
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.pictures import AutoencoderFiles
from lumina.configs import LuminaConfig
from lumina.model import LuminaModel
from lumina.names import LUMINA
from lumina.options import DEFAULT_TOKENS, LuminaTextOptions
from lumina.text_encoder import GEMMA_FILES, GEMMA_NAMES, GEMMA_OPTION, GemmaTextEncoder, read_gemma
from modules.devices import select_compute_dtype
from modules.errors import CheckpointError
from networks.names.layouts import tensor_patterns
from protocols.family import TextEncoder
from protocols.loading import TensorSource

MODEL_LABEL = "a Lumina-Image-2.0 transformer"
RELEASED_FILES = (
    "lumina_2_model_bf16.safetensors, the folder transformer of Alpha-VLLM/Lumina-Image-2.0, or an "
    "all-in-one file such as Neta Lumina's"
)
DIT_OPTION = "--pretrained_model_name_or_path"
PATCH = 2
# dialect -> a tensor that only it has, its names
DIALECTS: dict[str, tuple[str, Names]] = {
    "official": ("layers.0.attention.qkv.weight", ()),
    "diffusers": ("layers.0.attn.to_q.weight", tensor_patterns(LUMINA)),
}
IDENTIFYING_TENSOR = "cap_embedder.1.weight"  # tensor that identifies Lumina-Image-2.0, by its published name
UNUSED = "norm_final.weight"  # in the published files; the model does not use it


def _read_header(checkpoint: Checkpoint) -> DitHeader[LuminaConfig]:
    """Read config and dialect of a Lumina-Image 2.0 file; raise CheckpointError for another model."""
    names = checkpoint.tensors
    known_dialects = (
        name for name, (identifying_tensor, _) in DIALECTS.items() if identifying_tensor in names
    )
    dialect = next(known_dialects, "official")
    identifying_tensor, table = DIALECTS[dialect]
    stored_shapes = {name: info.shape for name, info in names.items()}
    file_shapes = joined_shapes(stored_shapes, table)
    if identifying_tensor not in names or IDENTIFYING_TENSOR not in file_shapes:
        raise make_wrong_kind_error(checkpoint, MODEL_LABEL, DIT_OPTION, RELEASED_FILES)
    shapes = DitShapes(checkpoint.path, file_shapes, "Lumina-Image-2.0")
    return DitHeader(_read_config(shapes), dialect, names[identifying_tensor].dtype)


def _read_config(shapes: DitShapes) -> LuminaConfig:
    """Return the dimensions of a transformer. Raises CheckpointError for another model's."""
    dim, patch_width = shapes.get_shape("x_embedder.weight")
    (head_width,) = shapes.get_shape("layers.0.attention.q_norm.weight", axes=1)
    rows = shapes.get_shape("layers.0.attention.qkv.weight")[0]
    time_dim, freq_dim = shapes.get_shape("t_embedder.mlp.0.weight")
    kv_rows = rows - dim  # keys and values; queries have `dim` rows
    # 6: a head divides into pairs of channels for each of three position axes
    if dim % head_width or head_width % 6 or kv_rows <= 0 or kv_rows % (2 * head_width):
        raise CheckpointError(
            f"{shapes.path}: width {dim}, heads of {head_width} and {rows} rows of queries, keys and values "
            "do not fit a Lumina-Image-2.0 transformer. Copy the file again.",
            shapes.path,
        )
    num_heads = dim // head_width
    num_kv_heads = kv_rows // (2 * head_width)
    if num_heads % num_kv_heads or patch_width % PATCH**2:
        raise CheckpointError(
            f"{shapes.path}: {num_heads} heads of queries and {num_kv_heads} of keys, patches of "
            f"width {patch_width} do not fit a Lumina-Image-2.0 transformer. Copy the file again.",
            shapes.path,
        )
    return LuminaConfig(
        dim=dim,
        ffn_dim=shapes.get_shape("layers.0.feed_forward.w1.weight")[0],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_layers=shapes.count_blocks("layers"),
        noise_refiner_layers=shapes.count_blocks("noise_refiner"),
        context_refiner_layers=shapes.count_blocks("context_refiner"),
        in_dim=patch_width // PATCH**2,
        text_dim=shapes.get_shape(IDENTIFYING_TENSOR)[1],
        time_dim=time_dim,
        freq_dim=freq_dim,
    )


def _make_sources(checkpoint: Checkpoint, header: DitHeader[LuminaConfig]) -> Mapping[str, TensorSource]:
    return join_parts(list_tensor_sources(checkpoint), DIALECTS[header.dialect][1])


FORMAT = DitFormat(
    _read_header,
    lambda _: MODEL_LABEL,
    network=LuminaModel,
    sources=_make_sources,
    option=DIT_OPTION,
    ignore=(UNUSED,),
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@dataclass(frozen=True)
class LuminaFiles(AutoencoderFiles):
    """Model files of a run: transformer, autoencoder, and Gemma 2, which overflows float16."""

    gemma2: Path | None = None
    gemma2_tokenizer: Path | None = None
    max_tokens: int = DEFAULT_TOKENS
    system_prompt: str = ""
    system_prompt_in_negative: bool = False

    format: ClassVar = FORMAT

    def add_text(self, options: LuminaTextOptions) -> "LuminaFiles":
        """Return a copy with the text encoder's path and settings from `options`."""
        return replace(
            self,
            gemma2=options.gemma2,
            gemma2_tokenizer=options.gemma2_tokenizer,
            text_dtype=select_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            max_tokens=options.gemma2_max_token_length or DEFAULT_TOKENS,
            system_prompt=options.system_prompt.strip(),
        )

    @property
    def gemma2_path(self) -> Path:
        """Return Gemma 2's path; raise OptionError if --gemma2 is missing."""
        return require_file(self.gemma2, GEMMA_OPTION, "Gemma 2 encodes the prompts")

    def text_encoders(self) -> list[TextEncoder]:
        """Return the text encoders, whose weights are read when they are loaded."""
        gemma = GemmaTextEncoder(
            self.gemma2_path,
            self.encoder_dtype(self.text_dtype),
            tokenizer=self.gemma2_tokenizer,
            system_prompt=self.system_prompt,
            in_negative=self.system_prompt_in_negative,
            max_tokens=self.max_tokens,
        )
        return [gemma]

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check that text encoders, if given or `needed`, fit their options and the transformer."""
        if self.gemma2 is not None or needed:
            path = GemmaTextEncoder(self.gemma2_path).path
            takes = None if config is None else config.text_dim
            check_state_width(
                GEMMA_OPTION, path, read_once(path, _read_gemma_width), self.dit, takes, GEMMA_NAMES
            )
        if self.gemma2_tokenizer is not None:
            GEMMA_FILES.check_option_value(self.gemma2_tokenizer)


def _read_gemma_width(checkpoint: Checkpoint) -> int:
    return read_gemma(checkpoint).config.dim
