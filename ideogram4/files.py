"""Transformer files of Ideogram 4, and a run's files: transformer, FLUX.2's autoencoder and Qwen3-VL.

Transformers have the released names, with queries, keys and values in one layer, or those of diffusers, which
splits it. Both networks have equal tensors: metadata and names tell them apart.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from checkpoints.dialects import DitShapes, join_parts, joined_shapes, make_wrong_kind_error
from checkpoints.dits import DitFormat, DitHeader, bare_names
from checkpoints.model_files import inside, read_once, require_file
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelFiles
from flux_2.vae import read_vae
from ideogram4.configs import SECOND, Ideogram4Config
from ideogram4.model import Ideogram4Model
from ideogram4.names import IDEOGRAM_4
from ideogram4.options import NAME, SECOND_FLAG
from ideogram4.texts import CACHE_DTYPES, ENCODER_SETTINGS, Ideogram4TextEncoder
from ideogram4.vae import Ideogram4Vae, load_vae
from modules.errors import CheckpointError
from networks.names.layouts import tensor_patterns
from protocols.loading import TensorSource

MODEL_LABEL = f"an {NAME} transformer"
DIT_OPTION = "--dit"
RELEASED_FILES = (
    "ideogram4_fp8_scaled.safetensors of Comfy-Org, or the folder transformer of ideogram-ai/ideogram-4-fp8"
)
IDENTIFYING_TENSOR = "embed_image_indicator.weight"
FUSED, SPLIT = "layers.0.attention.qkv.weight", "layers.0.attention.to_q.weight"
# dialect -> a tensor that only it has, and the names
DIALECTS = {"released": FUSED, "diffusers": SPLIT}
NAME_RULES = {"released": (), "diffusers": tensor_patterns(IDEOGRAM_4)}
# key of the metadata that says which of the two networks a file has, and its values
MODEL_TYPE, FIRST_TYPE, SECOND_TYPE = "model_type", "ideogram4_cond", "ideogram4_uncond"
_SECOND_NAME = re.compile(r"uncond(?![a-z]*_lora)", re.IGNORECASE)
_PREFIX = f"{SECOND}."  # of the second network's tensors beside the first's


def is_second(checkpoint: Checkpoint) -> bool:
    """Return whether a file has the network that predicts without a text, by its metadata or its name."""
    model_type = checkpoint.metadata.get(MODEL_TYPE)
    if model_type in (FIRST_TYPE, SECOND_TYPE):
        return model_type == SECOND_TYPE
    path = checkpoint.path.absolute()
    return any(_SECOND_NAME.search(name) for name in (path.name, path.parent.name))


def _read_header(checkpoint: Checkpoint) -> DitHeader[Ideogram4Config]:
    """Return the dimensions, dialect (its tensor names) and dtype of an Ideogram 4 file."""
    names = checkpoint.tensors
    dialect = next((name for name, tensor in DIALECTS.items() if tensor in names), None)
    if IDENTIFYING_TENSOR not in names or dialect is None:
        raise make_wrong_kind_error(checkpoint, MODEL_LABEL, DIT_OPTION, RELEASED_FILES)
    stored_shapes = {name: info.shape for name, info in names.items()}
    shapes = DitShapes(checkpoint.path, joined_shapes(stored_shapes, NAME_RULES[dialect]), NAME)
    return DitHeader(_read_config(shapes), dialect, names[DIALECTS[dialect]].dtype)


def _read_config(shapes: DitShapes) -> Ideogram4Config:
    """Return the dimensions of a transformer. Raises CheckpointError if they do not match each other."""
    dim, text_dim = shapes.get_shape("llm_cond_proj.weight")
    (head_width,) = shapes.get_shape("layers.0.attention.norm_q.weight", axes=1)
    ffn_dim = shapes.get_shape("layers.0.feed_forward.w1.weight")[0]
    time_dim = shapes.get_shape("adaln_proj.weight")[0]
    channels = shapes.get_shape("input_proj.weight")[1]
    fits = (
        dim % head_width == 0
        and head_width % 2 == 0
        and dim % 2 == 0
        and shapes.get_shape(FUSED) == (3 * dim, dim)
        and shapes.get_shape("layers.0.adaln_modulation.weight") == (4 * dim, time_dim)
        and shapes.get_shape("final_layer.linear.weight") == (channels, dim)
        and shapes.get_shape(IDENTIFYING_TENSOR) == (2, dim)
    )
    if not fits:
        raise CheckpointError(
            f"{shapes.path}: width {dim}, heads of {head_width} and feed-forwards of {ffn_dim} do not fit "
            f"{MODEL_LABEL}. Copy the file again.",
            shapes.path,
        )
    return Ideogram4Config(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=dim // head_width,
        num_kv_heads=dim // head_width,
        num_layers=shapes.count_blocks("layers"),
        noise_refiner_layers=0,
        context_refiner_layers=0,
        in_dim=channels,
        text_dim=text_dim,
        time_dim=time_dim,
    )


def _make_sources(checkpoint: Checkpoint, header: DitHeader[Ideogram4Config]) -> Mapping[str, TensorSource]:
    sources = list_tensor_sources(checkpoint)
    first = {name: source for name, source in sources.items() if not name.startswith(_PREFIX)}
    joined = join_parts(first, NAME_RULES[header.dialect])
    second = {name.removeprefix(_PREFIX): source for name, source in sources.items() if name not in first}
    if second:  # it may have the other names
        dialect = "diffusers" if SPLIT in second else "released"
        for name, source in join_parts(second, NAME_RULES[dialect]).items():
            joined[f"{_PREFIX}{name}"] = source
    return joined


def _add_second(first: Checkpoint, second: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the tensors of both networks, those of the second with a prefix."""
    return first.join(bare_names(second).rename(lambda name: f"{_PREFIX}{name}"))


FORMAT = DitFormat(
    _read_header,
    lambda _: MODEL_LABEL,
    network=Ideogram4Model,
    sources=_make_sources,
    option=DIT_OPTION,
    add_second=_add_second,
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@dataclass(frozen=True)
class Ideogram4Files(LanguageModelFiles):
    """Model files of a run: one or two transformers, FLUX.2's autoencoder and Qwen3-VL's language model."""

    unconditional_dit: Path | None = None
    unconditional_lora: Path | None = None  # makes the first network predict as the second
    cache_dtype: torch.dtype | None = None  # of text states
    stops_at_errors: bool | None = None  # see `Ideogram4TextEncoder`

    format: ClassVar = FORMAT
    vae_folder: ClassVar[str] = "vae"
    encoder_settings: ClassVar[LanguageEncoderSettings] = ENCODER_SETTINGS

    @property
    def dit_path(self) -> Path:
        """Return the transformer's path, or for a release folder its subfolder `transformer`."""
        return inside(super().dit_path, "transformer")

    @property
    def second_path(self) -> Path | None:
        """Return the path of the second transformer, or its subfolder in a release; None if none is given.

        Raises:
            OptionError: If the file is missing.
        """
        if self.unconditional_dit is None:
            return None
        path = require_file(self.unconditional_dit, SECOND_FLAG, "the second transformer")
        return inside(path, "unconditional_transformer")

    def dit_header(self) -> DitHeader[Ideogram4Config]:
        """Return the header of the transformer's file.

        Raises:
            CheckpointError: If it is the network that predicts without a text.
        """
        if read_once(self.dit_path, is_second):
            raise CheckpointError(
                f"{DIT_OPTION} {self.dit_path} is the network that predicts without a text, which "
                f"learns nothing and makes nothing alone. Pass {RELEASED_FILES} to {DIT_OPTION}, and "
                f"this file to {SECOND_FLAG}.",
                self.dit_path,
            )
        header: DitHeader[Ideogram4Config] = super().dit_header()
        return header

    def check_second(self) -> None:
        """Check the second transformer without loading it.

        Raises:
            CheckpointError: If its file has the network of --dit, another model, or other dimensions.
        """
        path = self.second_path
        if path is None:
            return
        second = read_once(path, FORMAT.read_header)
        if not read_once(path, is_second):
            raise CheckpointError(
                f"{SECOND_FLAG} {path}: neither its metadata nor its name says unconditional, so it is "
                f"the network for {DIT_OPTION}. Pass ideogram4_unconditional_fp8_scaled.safetensors of "
                "Comfy-Org, or the folder unconditional_transformer of ideogram-ai/ideogram-4-fp8.",
                path,
            )
        if self.dit is not None and second.config != self.dit_header().config:
            raise CheckpointError(
                f"{SECOND_FLAG} {path}: its dimensions differ from those of {self.dit_path}. Pass the "
                "second network of the same release.",
                path,
            )

    def language_model(self) -> Ideogram4TextEncoder:
        """Return Qwen3-VL's encoder without opening its file."""
        encoder = Ideogram4TextEncoder(
            self.encoder_settings,
            self.text_encoder_path,
            dtype=self.encoder_dtype(self.text_dtype),
            tokenizer=self.text_encoder_tokenizer,
            form=self.text_form,
            on_cpu=self.text_on_cpu,
        )
        encoder.cache_dtype = self.cache_dtype
        encoder.stops_at_errors = self.stops_at_errors
        return encoder

    def add_caching(self, dtype: str | None, stops_at_errors: bool | None) -> "Ideogram4Files":
        """Return a copy with the dtype of cached states, and what happens at captions with errors."""
        return replace(
            self, cache_dtype=None if dtype is None else CACHE_DTYPES[dtype], stops_at_errors=stops_at_errors
        )

    def load_vae(self, device: torch.device) -> Ideogram4Vae:
        """Load the VAE in the dtype and tile size that the options set."""
        return load_vae(self.vae_path, device, self.encoder_dtype(self.vae_dtype), self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the VAE of this model."""
        read_once(self.vae_path, read_vae)
