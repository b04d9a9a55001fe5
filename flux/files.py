"""Files of a FLUX.1 or Chroma run: paths, and the check that each fits its option.

Transformers are as published, or as diffusers writes them.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from checkpoints.dialects import (
    DitShapes,
    Names,
    count,
    find_dialect,
    join_parts,
    joined_shapes,
    make_wrong_kind_error,
)
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.encoders import check_state_width
from checkpoints.model_files import read_once, require_file
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.clip_l import CLIP_L, ClipTextEncoder
from encoders.pictures import AutoencoderFiles
from encoders.t5 import USE, T5TextEncoder
from flux.configs import CHROMA, DEV, PATCH, SCHNELL, T5_TOKENS, ApproximatorConfig, FluxConfig
from flux.model import FluxModel
from flux.names import FLUX
from flux.options import FluxTextOptions
from modules.devices import select_compute_dtype
from modules.errors import CheckpointError, OptionError
from modules.speed_options import text_form
from networks.names.layouts import tensor_patterns
from protocols.family import TextEncoder
from protocols.loading import TensorSource

logger = logging.getLogger(__name__)
MODEL_KIND = "a FLUX.1 or Chroma transformer"
NAMES = {
    DEV: "a FLUX.1 dev transformer",
    SCHNELL: "a FLUX.1 schnell transformer",
    CHROMA: "a Chroma transformer",
}
FILES = (
    "flux1-dev.safetensors, flux1-schnell.safetensors, Chroma1-HD.safetensors, or the folder transformer of "
    "a diffusers pipeline"
)
DIT_OPTION = "--dit (--pretrained_model_name_or_path)"
# dialect -> its first weight of queries, its tensor names
DIALECTS: dict[str, tuple[str, Names]] = {
    "official": ("double_blocks.0.img_attn.qkv.weight", ()),
    "diffusers": ("transformer_blocks.0.attn.to_q.weight", tensor_patterns(FLUX)),
}
SWAPPED = ("final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias")
APPROXIMATOR = "distilled_guidance_layer"
# tensors of related models, whose blocks have the same names in one of the layouts
RELATED_MODEL_TENSORS = (
    "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
    "byt5_in.fc1.weight",
    "controlnet_x_embedder.weight",
    "double_stream_modulation_img.lin.weight",  # in FLUX.2
    "double_stream_modulation_img.linear.weight",
)
HEAD_MULTIPLE = 16  # a head's width divides into whole pairs for frames, rows and columns


def _read_header(checkpoint: Checkpoint) -> DitHeader[FluxConfig]:
    """Return dimensions, dialect (its tensor names) and dtype of a FLUX.1 or Chroma file."""
    tensors = checkpoint.tensors
    dialect = find_dialect(DIALECTS, tensors)
    if dialect is None:
        raise make_wrong_kind_error(checkpoint, MODEL_KIND, DIT_OPTION, FILES)
    query_weight, names = DIALECTS[dialect]
    file_shapes = joined_shapes({name: info.shape for name, info in tensors.items()}, names)
    # FLUX.1 embeds flattened patches by a matrix; related models use a convolution, which has more axes
    has_matrix = len(file_shapes.get("img_in.weight", ())) == 2
    if not has_matrix or any(name in tensors for name in RELATED_MODEL_TENSORS):
        raise make_wrong_kind_error(checkpoint, MODEL_KIND, DIT_OPTION, FILES)
    config = _read_config(DitShapes(checkpoint.path, file_shapes, "FLUX.1"))
    return DitHeader(config, dialect, tensors[query_weight].dtype)


def _read_config(shapes: DitShapes) -> FluxConfig:
    """Return the dimensions of a transformer. Raises CheckpointError if they do not match each other."""
    dim, token_dim = shapes.get_shape("img_in.weight")
    (head_width,) = shapes.get_shape("double_blocks.0.img_attn.norm.query_norm.scale", axes=1)
    if dim % head_width or head_width % HEAD_MULTIPLE or token_dim % PATCH**2:
        raise CheckpointError(
            f"{shapes.path}: width {dim}, heads of {head_width} and tokens of width {token_dim} do not "
            "fit a FLUX.1 transformer. Copy the file again.",
            shapes.path,
        )
    sizes: dict[str, Any] = {
        "dim": dim,
        "ffn_dim": shapes.get_shape("double_blocks.0.img_mlp.0.weight")[0],
        "num_heads": dim // head_width,
        "double_blocks": shapes.count_blocks("double_blocks"),
        "single_blocks": shapes.count_blocks("single_blocks"),
        "token_dim": token_dim,
        "text_dim": shapes.get_shape("txt_in.weight")[1],
    }
    if f"{APPROXIMATOR}.in_proj.weight" in shapes.shapes:  # Chroma
        # Read the dimensions of the network that computes Chroma's modulation
        width, in_dim = shapes.get_shape(f"{APPROXIMATOR}.in_proj.weight")
        layers = count(shapes.shapes, rf"{APPROXIMATOR}\.layers\.\d+")
        if in_dim % 8:
            raise CheckpointError(
                f"{shapes.path}: an approximator of {in_dim} inputs is not Chroma's. Copy the file again.",
                shapes.path,
            )
        sizes["approximator"] = ApproximatorConfig(in_dim, width, layers)
    else:
        if "vector_in.in_layer.weight" not in shapes.shapes:
            raise CheckpointError(
                f"{shapes.path} has neither the pooled text of FLUX.1 (vector_in) nor the approximator of "
                "Chroma: it is the transformer of LongCat-Image or of another model, which is not supported "
                "yet. Pass a file of FLUX.1 or Chroma.",
                shapes.path,
            )
        sizes["pooled_dim"] = shapes.get_shape("vector_in.in_layer.weight")[1]
        sizes["freq_dim"] = shapes.get_shape("time_in.in_layer.weight")[1]
        sizes["has_guidance"] = "guidance_in.in_layer.weight" in shapes.shapes
    return FluxConfig(**sizes)


def _make_sources(checkpoint: Checkpoint, header: DitHeader[FluxConfig]) -> Mapping[str, TensorSource]:
    swapped = SWAPPED if header.dialect == "diffusers" else ()
    return join_parts(list_tensor_sources(checkpoint), DIALECTS[header.dialect][1], swapped)


FORMAT = DitFormat(
    _read_header,
    lambda header: NAMES[header.config.kind],
    network=FluxModel,
    sources=_make_sources,
    option=DIT_OPTION,
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@lru_cache
def _log_chroma(path: Path) -> None:
    logger.info("%s is Chroma: it is used as --model_type chroma, without CLIP-L", path)


@dataclass(frozen=True)
class FluxFiles(AutoencoderFiles):
    """Model files of a run: transformer, autoencoder, CLIP-L and T5.

    The transformer's file shows whether it is dev, schnell or Chroma.
    """

    dit_option: str = DIT_OPTION
    says_chroma: bool = False  # --model_type chroma
    clip_l: Path | None = None
    t5xxl: Path | None = None
    clip_l_tokenizer: Path | None = None
    t5xxl_tokenizer: Path | None = None
    t5_form: str | None = None
    max_tokens: int | None = None  # that T5 reads; None: as the transformer was trained
    masks_text: bool = False  # --apply_t5_attn_mask; always so for Chroma

    format: ClassVar = FORMAT
    clip_settings: ClassVar = CLIP_L  # how options, messages and caches call the text encoders
    t5_settings: ClassVar = USE

    def add_text(self, options: FluxTextOptions) -> "FluxFiles":
        """Return a copy with the text encoders' paths and settings from `options`."""
        return replace(
            self,
            clip_l=options.clip_l,
            t5xxl=options.t5xxl,
            clip_l_tokenizer=options.clip_l_tokenizer,
            t5xxl_tokenizer=options.t5xxl_tokenizer,
            text_dtype=select_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            t5_form=text_form(options),
            max_tokens=options.t5xxl_max_token_length,
            masks_text=options.apply_t5_attn_mask,
        )

    @property
    def clip_l_path(self) -> Path:
        """Return CLIP-L's path; raise OptionError if its option is missing."""
        return require_file(self.clip_l, self.clip_settings.option, "CLIP-L encodes the prompts")

    @property
    def t5xxl_path(self) -> Path:
        """Return T5's path; raise OptionError if its option is missing."""
        return require_file(self.t5xxl, self.t5_settings.kind.option, "T5 encodes the prompts")

    def dit_header(self) -> DitHeader[FluxConfig]:
        """Read dimensions, dialect and dtype of the transformer file.

        Raises OptionError if it does not fit --model_type.
        """
        header = super().dit_header()
        if self.says_chroma and header.config.kind != CHROMA:
            raise OptionError(
                f"--model_type chroma: {self.dit_path} is {NAMES[header.config.kind]}. Omit the option, "
                "or pass a Chroma checkpoint"
            )
        if header.config.kind == CHROMA and not self.says_chroma:
            _log_chroma(self.dit_path)
        return header

    @property
    def kind(self) -> str:
        """Return the kind of the transformer, from its file or else from --model_type."""
        if self.dit is None:
            return CHROMA if self.says_chroma else DEV
        return self.dit_header().config.kind

    @property
    def has_pooled(self) -> bool:
        """Return whether the model takes CLIP-L's pooled state, as all but Chroma do."""
        return self.kind != CHROMA

    @property
    def uses_mask(self) -> bool:
        """Return whether padding is masked: with --apply_t5_attn_mask, and always for Chroma."""
        return self.masks_text or self.kind == CHROMA

    @property
    def t5_tokens(self) -> int:
        """Return the maximum number of T5 tokens per prompt."""
        return self.max_tokens or T5_TOKENS[self.kind]

    def text_encoders(self) -> list[TextEncoder]:
        """Return the text encoders, whose weights are read when they are loaded."""
        dtype = self.encoder_dtype(self.text_dtype)
        t5 = T5TextEncoder(
            self.t5xxl_path,
            dtype,
            self.t5xxl_tokenizer,
            max_length=self.t5_tokens,
            uses_mask=self.uses_mask,
            form=self.t5_form,
            naming=self.t5_settings,
        )
        return [*([self._make_clip(dtype)] if self.has_pooled else []), t5]

    def check_texts(self, config: Any, needed: bool) -> None:
        """Raise CheckpointError unless CLIP-L and T5, if given or needed, fit options and transformer.

        `config` has the transformer's dimensions; without it only the files themselves are checked.
        """
        if self.clip_l is not None or (needed and self.has_pooled):
            # Raise CheckpointError unless CLIP-L has the width that the transformer takes; None is any width
            clip = self.clip_settings
            path = self._make_clip().path
            check_state_width(
                clip.option,
                path,
                width=read_once(path, clip.read_width),
                dit_path=self.dit,
                dit_width=None if config is None else config.pooled_dim or None,
                fits=clip.release,
            )
        if self.t5xxl is not None or needed:
            # Raise CheckpointError unless T5 has the width that the transformer takes; None is any width
            t5 = self.t5_settings
            path = T5TextEncoder(self.t5xxl_path).path
            check_state_width(
                t5.kind.option,
                path,
                width=read_once(path, t5.read_width),
                dit_path=self.dit,
                dit_width=None if config is None else config.text_dim,
                fits=t5.kind.release,
            )
        if self.clip_l_tokenizer is not None:
            self.clip_settings.tokenizer.check_option_value(self.clip_l_tokenizer)
        if self.t5xxl_tokenizer is not None:
            self.t5_settings.tokenizer.check_option_value(self.t5xxl_tokenizer)

    def _make_clip(self, dtype: torch.dtype = torch.bfloat16) -> ClipTextEncoder:
        return ClipTextEncoder(self.clip_l_path, dtype, self.clip_l_tokenizer, self.clip_settings)
