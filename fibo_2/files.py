"""Transformer files of Fibo 2.0, and the files of a run: transformer, FLUX.2's autoencoder and Qwen3-VL.

Transformers have the released names, which are those of diffusers; ComfyUI stacks some layers, and early
files have the names of the release's own code. dev and edit-turbo have equal tensors: only names distinguish
them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch

from checkpoints.dialects import (
    DitShapes,
    cut_parts,
    make_wrong_kind_error,
    parted_shapes,
    rename_sources,
    translate_name,
)
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.model_files import inside, read_once
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelFiles
from fibo_2.configs import MAX_INJECTIONS, STATES_PER_BUNDLE, Fibo2Config
from fibo_2.model import Fibo2Model
from fibo_2.names import FIBO_2
from fibo_2.options import NAME, Fibo2TextOptions
from fibo_2.texts import ENCODER_SETTINGS, Fibo2TextEncoder
from flux_2.vae import Flux2Vae, load_vae, read_vae
from modules.errors import CheckpointError
from networks.names.layouts import joined_tensors, tensor_patterns
from protocols.loading import TensorSource

MODEL_KIND = f"a {NAME} transformer"
DIT_OPTION, SAMPLE_DIT_OPTION = "--dit", "--distilled_dit"
FILES = "fibo2_dev_bf16.safetensors of Comfy-Org, or the folder transformer of briaai/Fibo-2.0-dev"
IDENTIFYING_TENSOR = "perceiver.latent_queries"
STACKED_QKV_WEIGHT = "layers.0.attention.qkv.weight"
FUSED_LAYERS = joined_tensors(FIBO_2)
# names in early files, from the release's own code
_EARLY = (
    (r"all_x_embedder\.2-1\.(.+)", r"x_embedder.\1"),
    (r"all_final_layer\.2-1\.(.+)", r"final_layer.\1"),
    *(
        pattern
        for kind in ("cross", "self")
        for pattern in (
            (rf"(perceiver\.layers\.\d+)\.{kind}_([qkv]\.\w+)", rf"\1.{kind}_attention.to_\2"),
            (rf"(perceiver\.layers\.\d+)\.{kind}_(out)\.(\w+)", rf"\1.{kind}_attention.to_\2.0.\3"),
            (rf"(perceiver\.layers\.\d+)\.{kind}_(norm_[qk]\.\w+)", rf"\1.{kind}_attention.\2"),
        )
    ),
)
NAMES = (*tensor_patterns(FIBO_2), *_EARLY)
_INJECTION = re.compile(r"layers\.(\d+)\.cross_attn_gate")


def _our_name(name: str) -> str:
    return translate_name(name, NAMES)


def _read_header(checkpoint: Checkpoint) -> DitHeader[Fibo2Config]:
    names = checkpoint.tensors
    if IDENTIFYING_TENSOR not in names:
        raise make_wrong_kind_error(checkpoint, MODEL_KIND, DIT_OPTION, FILES)
    dialect = "comfy" if STACKED_QKV_WEIGHT in names else "released"
    file_shapes = {_our_name(name): info.shape for name, info in names.items()}
    shapes = DitShapes(checkpoint.path, parted_shapes(file_shapes, FUSED_LAYERS), NAME)
    config = _read_config(shapes)
    query = STACKED_QKV_WEIGHT if dialect == "comfy" else "layers.0.attention.to_q.weight"
    return DitHeader(config, dialect, names[query].dtype)


def _read_config(shapes: DitShapes) -> Fibo2Config:
    """Return the dimensions of a transformer. Raises CheckpointError if they do not match each other."""
    dim, channels = shapes.get_shape("x_embedder.weight")
    (head_dim,) = shapes.get_shape("layers.0.attention.norm_q.weight", axes=1)
    hidden, freq_dim = shapes.get_shape("t_embedder.mlp.0.weight")
    max_gist, gist_dim = shapes.get_shape(IDENTIFYING_TENSOR)
    text_dim = shapes.get_shape("perceiver.layers.0.cross_attention.to_k.weight")[1]
    # The indices of the blocks that read text states through a cross-attention of their own
    matches = [_INJECTION.fullmatch(name) for name in shapes.shapes]
    injections = tuple(sorted(int(match[1]) for match in matches if match))
    # sizes that heads, rotary pairs and text layers require
    fits = (
        dim % head_dim == 0
        and head_dim % 16 == 0
        and gist_dim == dim
        and max_gist % 8 == 0
        and text_dim % STATES_PER_BUNDLE == 0
        and len(injections) <= MAX_INJECTIONS
        and shapes.get_shape("layers.0.attention.to_q.weight") == (dim, dim)
    )
    if not fits:
        raise CheckpointError(
            f"{shapes.path}: width {dim}, heads of {head_dim}, {max_gist} gist tokens and {len(injections)} "
            f"blocks that read the text do not fit {MODEL_KIND}. Copy the file again.",
            shapes.path,
        )
    return Fibo2Config(
        dim=dim,
        ffn_dim=shapes.get_shape("layers.0.feed_forward.w1.weight")[0],
        num_heads=dim // head_dim,
        num_kv_heads=dim // head_dim,
        num_layers=shapes.count_blocks("layers"),
        noise_refiner_layers=shapes.count_blocks("noise_refiner"),
        context_refiner_layers=0,
        in_dim=channels,
        text_dim=text_dim,
        time_dim=shapes.get_shape("t_embedder.mlp.2.weight")[0],
        freq_dim=freq_dim,
        time_hidden=hidden,
        max_gist=max_gist,
        perceiver_layers=shapes.count_blocks("perceiver.layers"),
        injections=injections,
    )


def _make_sources(checkpoint: Checkpoint, _: DitHeader[Fibo2Config]) -> Mapping[str, TensorSource]:
    return cut_parts(rename_sources(list_tensor_sources(checkpoint), _our_name), FUSED_LAYERS)


FORMAT = DitFormat(
    _read_header, lambda _: MODEL_KIND, network=Fibo2Model, sources=_make_sources, option=DIT_OPTION
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@dataclass(frozen=True)
class Fibo2Files(LanguageModelFiles):
    """Model files of a run: the transformer, FLUX.2's autoencoder and Qwen3-VL's language model."""

    format: ClassVar = FORMAT
    vae_folder: ClassVar[str] = "vae"
    encoder_settings: ClassVar[LanguageEncoderSettings] = ENCODER_SETTINGS
    draws_texts: bool = True  # whether the text encoder sees drawings of the texts of a caption
    fonts: tuple[Path, ...] = ()

    def add_text(self, options: Fibo2TextOptions) -> Self:  # type: ignore[override]
        """Return a copy with the settings of the text encoder, and whether and how it sees drawn texts."""
        files = super().add_text(options)
        return replace(files, draws_texts=not options.no_text_images, fonts=options.fonts or ())

    def language_model(self) -> Fibo2TextEncoder:
        """Return Qwen3-VL's encoder without opening its file.

        Raises:
            OptionError: If a font cannot be read.
        """
        return Fibo2TextEncoder(
            self.encoder_settings,
            self.text_encoder_path,
            dtype=self.encoder_dtype(self.text_dtype),
            tokenizer=self.text_encoder_tokenizer,
            form=self.text_form,
            on_cpu=self.text_on_cpu,
            draws_texts=self.draws_texts,
            font_paths=self.fonts,
        )

    @property
    def dit_path(self) -> Path:
        """Return the transformer's path, or for a release folder its subfolder `transformer`."""
        return inside(super().dit_path, "transformer")

    def text_width(self) -> int:
        """Return the width of a bundle's text states, several layers side by side."""
        return STATES_PER_BUNDLE * super().text_width()

    def load_vae(self, device: torch.device) -> Flux2Vae:
        """Load the VAE with the options for its dtype and tiles."""
        return load_vae(self.vae_path, device, self.encoder_dtype(self.vae_dtype), self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the VAE of this model."""
        read_once(self.vae_path, read_vae)
