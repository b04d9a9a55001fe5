"""Checkpoints of Anima: transformers in the released layout and in diffusers', and separate adapter files.

The adapter is in the transformer's file as distributed; a diffusers release has it as `text_conditioner`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from anima.configs import ADAPTER, PATCH, AdapterConfig, AnimaConfig
from anima.model import AnimaModel
from anima.names import ANIMA
from anima.options import MAX_TOKENS, NAME, AnimaTextOptions
from anima.text_encoder import T5_FILES, AnimaTextEncoder, make_encoder_settings
from checkpoints.dialects import DitShapes, join_parts, joined_shapes, make_wrong_kind_error
from checkpoints.dits import DitFormat, DitHeader, bare_names
from checkpoints.model_files import read_once, require_file
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from encoders.language_encoder import LanguageEncoderSettings
from modules.devices import select_compute_dtype
from modules.errors import CheckpointError
from modules.speed_options import text_form
from networks.names.layouts import tensor_patterns
from protocols.loading import TensorSource
from qwen_image.files import QwenImageFiles

MODEL_KIND = f"an {NAME} transformer"
DIT_OPTION = "--pretrained_model_name_or_path"
ADAPTER_OPTION = "--llm_adapter_path"
FILES = "anima-base-v1.0.safetensors, or the folder transformer of a diffusers release"
ADAPTER_FILES = "the folder text_conditioner of a diffusers release, or a file with Anima's adapter"
# dialect -> a tensor that only it has
DIALECTS = {"released": "x_embedder.proj.1.weight", "diffusers": "patch_embed.proj.weight"}
QUERY_WEIGHTS = {
    "released": "blocks.0.self_attn.q_proj.weight",
    "diffusers": "transformer_blocks.0.attn1.to_q.weight",
}
NAME_RULES = {"released": (), "diffusers": tensor_patterns(ANIMA)}
ADAPTER_PREFIX = f"{ADAPTER}."
ADAPTER_NORM = "out_proj.weight"
CONNECTOR = "anima_v2_connector."  # prefix in a format that replaces the adapter with another network
COSMOS_14B_WIDTH = 5120  # width of Cosmos-Predict2 14B


def join_adapter(transformer: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """Return the transformer's tensors plus the tensors of an adapter file, which take precedence.

    Raises CheckpointError if the second file has no adapter.
    """
    unprefixed = bare_names(adapter)
    if any(name.startswith(ADAPTER_PREFIX) for name in unprefixed.tensors):
        renamed = unprefixed.select_by_prefix(ADAPTER_PREFIX)
    elif ADAPTER_NORM in unprefixed.tensors:
        renamed = unprefixed.rename(lambda name: ADAPTER_PREFIX + name)
    else:
        raise make_wrong_kind_error(adapter, f"{NAME}'s adapter", ADAPTER_OPTION, ADAPTER_FILES)
    without_adapter = transformer.rename(lambda name: "" if name.startswith(ADAPTER_PREFIX) else name)
    return without_adapter.join(renamed)


def _read_header(checkpoint: Checkpoint) -> DitHeader[AnimaConfig]:
    """Return dimensions, tensor names and dtype of an Anima file; raise CheckpointError for another model."""
    names = checkpoint.tensors
    dialect = next((name for name, tensor in DIALECTS.items() if tensor in names), None)
    if dialect is None:
        raise make_wrong_kind_error(checkpoint, MODEL_KIND, DIT_OPTION, FILES)
    path = checkpoint.path
    if any(name.startswith(CONNECTOR) for name in names):
        raise CheckpointError(
            f"{path} has tensors of {CONNECTOR}*: it is for another text encoder, which is not supported. "
            f"Pass {FILES}.",
            path,
        )
    stored_shapes = {name: info.shape for name, info in names.items()}
    shapes = DitShapes(path, joined_shapes(stored_shapes, NAME_RULES[dialect]), NAME)
    return DitHeader(_read_config(shapes), dialect, names[QUERY_WEIGHTS[dialect]].dtype)


def _read_config(shapes: DitShapes) -> AnimaConfig:
    """Return the dimensions of an Anima transformer, read from its tensor shapes."""
    dim, input_width = shapes.get_shape("x_embedder.proj.1.weight")
    output_width, _ = shapes.get_shape("final_layer.linear.weight")
    # Raise CheckpointError for Cosmos-Predict2, whose tensors have the same names
    # `input_width` and `output_width` are the numbers of values in a patch of the input and of the output.
    if input_width == output_width + 2 * PATCH**2:
        raise CheckpointError(
            f"{shapes.path} takes two channels more than latents have: it is Cosmos-Predict2 for videos, "
            f"which is not supported. Pass {FILES}.",
            shapes.path,
        )
    if dim == COSMOS_14B_WIDTH:
        raise CheckpointError(
            f"{shapes.path} has width {dim}: it is Cosmos-Predict2 14B, but {NAME} was made from its 2B. "
            f"Pass {FILES}.",
            shapes.path,
        )
    query_width, _ = shapes.get_shape("blocks.0.self_attn.q_proj.weight")
    (head_dim,) = shapes.get_shape("blocks.0.self_attn.q_norm.weight", axes=1)
    # the embedder takes one more channel than the output has: the padding mask
    has_patches = output_width % PATCH**2 == 0 and input_width == output_width + PATCH**2
    # frequencies come in pairs, and each axis needs more than one of them to stretch
    has_heads = query_width == dim and dim % head_dim == 0 and head_dim % 2 == 0 and head_dim // 6 >= 2
    if not has_heads or not has_patches:
        raise CheckpointError(
            f"{shapes.path} does not have the sizes of {MODEL_KIND}: width {dim}, queries of width "
            f"{query_width}, heads of width {head_dim}, patches of {input_width} values in the input and "
            f"{output_width} in the output. Copy the file again.",
            shapes.path,
        )
    return AnimaConfig(
        dim=dim,
        ffn_dim=shapes.get_shape("blocks.0.mlp.layer1.weight")[0],
        num_heads=dim // head_dim,
        num_layers=shapes.count_blocks("blocks"),
        context_dim=shapes.get_shape("blocks.0.cross_attn.k_proj.weight")[1],
        modulation_dim=shapes.get_shape("blocks.0.adaln_modulation_mlp.1.weight")[0],
        adapter=_read_adapter(shapes),
        channels=output_width // PATCH**2,
    )


def _read_adapter(shapes: DitShapes) -> AdapterConfig | None:
    """Return the dimensions of the adapter between language model and transformer; None without one."""
    if f"{ADAPTER_PREFIX}{ADAPTER_NORM}" not in shapes.shapes:
        return None
    first_block = f"{ADAPTER_PREFIX}blocks.0."
    vocabulary, dim = shapes.get_shape(f"{ADAPTER_PREFIX}embed.weight")
    (head_dim,) = shapes.get_shape(f"{first_block}cross_attn.q_norm.weight", axes=1)
    text_width = shapes.get_shape("blocks.0.cross_attn.k_proj.weight")[1]
    if dim % head_dim or head_dim % 2 or dim != text_width:
        raise CheckpointError(
            f"{shapes.path}: an adapter of width {dim} with heads of width {head_dim} does not fit a "
            f"transformer that takes texts of width {text_width}. Pass {ADAPTER_FILES} to {ADAPTER_OPTION}.",
            shapes.path,
        )
    return AdapterConfig(
        dim=dim,
        text_dim=shapes.get_shape(f"{first_block}cross_attn.k_proj.weight")[1],
        ffn_dim=shapes.get_shape(f"{first_block}mlp.0.weight")[0],
        num_heads=dim // head_dim,
        num_layers=shapes.count_blocks(f"{ADAPTER_PREFIX}blocks"),
        vocabulary=vocabulary,
    )


def _make_sources(checkpoint: Checkpoint, header: DitHeader[AnimaConfig]) -> Mapping[str, TensorSource]:
    return join_parts(list_tensor_sources(checkpoint), NAME_RULES[header.dialect])


def _describe(header: DitHeader[AnimaConfig]) -> str:
    if header.config.adapter is None:
        return "a transformer of Cosmos-Predict2 or Anima, without Anima's adapter"
    return MODEL_KIND


FORMAT = DitFormat(
    _read_header,
    _describe,
    network=AnimaModel,
    sources=_make_sources,
    option=DIT_OPTION,
    # buffers of the training code
    ignore=("pos_embedder.*", "*_extra_state", "accum_*"),
    add_second=join_adapter,
)
identify, load_dit = FORMAT.identify, FORMAT.load


def read_dit_header(checkpoint: Checkpoint, adapter: Path | None = None) -> DitHeader[AnimaConfig]:
    """Return the dimensions, tensor naming and dtype of a transformer and its text adapter.

    The text adapter converts the text encoder's states to the blocks' text input. `adapter` is its file, if
    it is not in the transformer's file. Raises CheckpointError if the file contains a different model, or if
    there is no text adapter.
    """
    if adapter is None:
        header = FORMAT.read_header(checkpoint)
    else:
        with open_checkpoint(adapter) as second:
            header = FORMAT.read_header(join_adapter(bare_names(checkpoint), second))
    if header.config.adapter is None:
        raise CheckpointError(
            f"{checkpoint.path} has no adapter ({ADAPTER_PREFIX}*), which {NAME} needs to read texts: it is "
            f"Cosmos-Predict2's transformer, or that of a diffusers release.\n  Pass {FILES}; of a diffusers "
            f"release, pass its folder text_conditioner to {ADAPTER_OPTION} too.",
            checkpoint.path,
        )
    return header


@dataclass(frozen=True)
class AnimaFiles(QwenImageFiles):
    """Model files for Anima: Qwen-Image's VAE, Qwen3 and T5's tokenizer."""

    dit_option: str = DIT_OPTION
    adapter: Path | None = None
    t5_tokenizer: Path | None = None
    t5_max_tokens: int = MAX_TOKENS
    encoder_settings: LanguageEncoderSettings = make_encoder_settings(MAX_TOKENS)

    format: ClassVar[DitFormat[Any, Any]] = FORMAT
    called: ClassVar[str] = NAME

    def add_texts(self, path: Path | None, options: AnimaTextOptions) -> "AnimaFiles":
        """Return a copy with the text options added; `path` is the text encoder's file."""
        return replace(
            self,
            text_encoder=path,
            text_encoder_tokenizer=options.text_encoder_tokenizer,
            t5_tokenizer=options.t5_tokenizer_path,
            t5_max_tokens=options.t5_max_token_length,
            encoder_settings=make_encoder_settings(options.qwen3_max_token_length),
            text_dtype=select_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            text_form=text_form(options),
            text_on_cpu=options.text_encoder_cpu,
        )

    def adapter_config(self) -> AdapterConfig:
        """Return the dimensions of the adapter from T5 tokens and Qwen3 states to text tokens.

        Raises CheckpointError if the transformer's files contain none, or the adapter of a different model.
        """
        adapter = self.dit_header().config.adapter
        assert adapter is not None  # `read_dit_header` rejects a model without
        return adapter

    @property
    def adapter_path(self) -> Path | None:
        """Return the path of a separate adapter file, or None; raise OptionError if the file is missing."""
        return None if self.adapter is None else require_file(self.adapter, ADAPTER_OPTION, "the adapter")

    def dit_header(self) -> DitHeader[AnimaConfig]:
        """Return the header of the transformer and its adapter; it is read once per file and process."""
        return read_once(self.dit_path, read_dit_header, self.adapter_path)

    def language_model(self) -> AnimaTextEncoder:
        """Return the text encoder; its weights are not read until it is loaded."""
        return AnimaTextEncoder(
            self.encoder_settings,
            self.text_encoder_path,
            dtype=self.encoder_dtype(self.text_dtype),
            tokenizer=self.text_encoder_tokenizer,
            form=self.text_form,
            on_cpu=self.text_on_cpu,
            t5_tokenizer=self.t5_tokenizer,
            t5_max_tokens=self.t5_max_tokens,
        )

    def check_texts(self, config: AnimaConfig | None, needed: bool) -> None:
        """Check the text encoder and both tokenizers if they are given or needed."""
        super().check_texts(None if config is None else config.adapter, needed)
        if self.t5_tokenizer is not None:
            T5_FILES.check_option_value(self.t5_tokenizer)
