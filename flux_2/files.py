"""Files of a FLUX.2 run: paths and dtypes, and the check that each fits its option and the release.

Transformers are as published, or as diffusers writes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from checkpoints.dialects import (
    DitShapes,
    Names,
    find_dialect,
    join_parts,
    joined_shapes,
    make_wrong_kind_error,
)
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.model_files import read_once
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelFiles
from flux_2.configs import AXES, Flux2Config
from flux_2.model import Flux2Model
from flux_2.names import FLUX_2
from flux_2.options import NAME, Flux2GenerationOptions, Flux2TrainingOptions
from flux_2.vae import Flux2Vae, load_vae, read_vae
from flux_2.versions import VERSIONS, Flux2Version
from modules.errors import CheckpointError, OptionError
from networks.names.layouts import swapped_tensors, tensor_patterns
from protocols.loading import TensorSource

MODEL_LABEL = f"a {NAME} transformer"
RELEASED_FILES = (
    "flux2-dev.safetensors, flux-2-klein-base-4b.safetensors, or the folder transformer of its release in "
    "diffusers layout"
)
DIT_OPTION = "--dit"
# dialect -> a tensor that only it has, its names
DIALECTS: dict[str, tuple[str, Names]] = {
    "official": ("double_stream_modulation_img.lin.weight", ()),
    "diffusers": ("double_stream_modulation_img.linear.weight", tensor_patterns(FLUX_2)),
}
QUERY_NORM = "double_blocks.0.img_attn.norm.query_norm.scale"


def _read_header(checkpoint: Checkpoint) -> DitHeader[Flux2Config]:
    """Return dimensions, dialect (its tensor names) and dtype of a FLUX.2 file."""
    names = checkpoint.tensors
    dialect = find_dialect(DIALECTS, names)
    if dialect is None:
        raise make_wrong_kind_error(checkpoint, MODEL_LABEL, DIT_OPTION, RELEASED_FILES)
    _, name_patterns = DIALECTS[dialect]
    stored_shapes = {name: info.shape for name, info in names.items()}
    config = _read_config(DitShapes(checkpoint.path, joined_shapes(stored_shapes, name_patterns), NAME))
    # a weight of the blocks shows the file's dtype
    block_weight = next(
        name for name in names if name.endswith(("img_mlp.0.weight", ".0.ff.linear_in.weight"))
    )
    return DitHeader(config, dialect, names[block_weight].dtype)


def _read_config(shapes: DitShapes) -> Flux2Config:
    """Return the dimensions of a transformer. Raises CheckpointError if they do not match each other."""
    dim, channels = shapes.get_shape("img_in.weight")
    (head_dim,) = shapes.get_shape(QUERY_NORM, axes=1)
    ffn_dim = shapes.get_shape("double_blocks.0.img_mlp.2.weight")[1]
    # rotary embedding: every axis rotates pairs of channels
    has_whole_heads = dim % head_dim == 0 and head_dim % (2 * AXES) == 0
    # the feed-forward is gated: its first layer computes the values and their gates
    if not has_whole_heads or shapes.get_shape("double_blocks.0.img_mlp.0.weight")[0] != 2 * ffn_dim:
        raise CheckpointError(
            f"{shapes.path}: width {dim}, heads of {head_dim} and feed-forwards of {ffn_dim} do not "
            f"fit {MODEL_LABEL}. Copy the file again.",
            shapes.path,
        )
    return Flux2Config(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=dim // head_dim,
        double_blocks=shapes.count_blocks("double_blocks"),
        single_blocks=shapes.count_blocks("single_blocks"),
        channels=channels,
        text_dim=shapes.get_shape("txt_in.weight")[1],
        freq_dim=shapes.get_shape("time_in.in_layer.weight")[1],
        has_guidance="guidance_in.in_layer.weight" in shapes.shapes,
    )


def _make_sources(checkpoint: Checkpoint, header: DitHeader[Flux2Config]) -> Mapping[str, TensorSource]:
    swapped = swapped_tensors(FLUX_2) if header.dialect == "diffusers" else ()
    return join_parts(list_tensor_sources(checkpoint), DIALECTS[header.dialect][1], swapped)


def describe(header: DitHeader[Flux2Config]) -> str:
    """Return the kind of a transformer file for messages, such as "a FLUX.2 dev transformer"."""
    return f"a {NAME} dev transformer" if header.config.has_guidance else f"a {NAME} klein transformer"


FORMAT = DitFormat(_read_header, describe, network=Flux2Model, sources=_make_sources, option=DIT_OPTION)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@dataclass(frozen=True)
class Flux2Files(LanguageModelFiles):
    """Model files of a run: the transformer, FLUX.2's autoencoder and the language model of its release."""

    model_version: str = "dev"

    format: ClassVar = FORMAT
    vae_folder: ClassVar[str] = "vae"

    @property
    def version(self) -> Flux2Version:
        """Release that --model_version names."""
        return VERSIONS[self.model_version]

    @property
    def encoder_settings(self) -> LanguageEncoderSettings:
        """Return how the release uses its language model."""
        return self.version.encoder_settings

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check that the text encoder's width fits the transformer, or without one the --model_version."""
        super().check_texts(config, needed)
        if config is None and self.text_encoder is not None:
            width = self.text_width()
            fit = [name for name, release in VERSIONS.items() if release.text_dim == width]
            if fit and self.model_version not in fit:
                model = self.encoder_settings.model
                raise OptionError(
                    f"{model.option} {self.text_encoder} is the text encoder of --model_version "
                    f"{' and '.join(fit)}, not of {self.model_version}. Pass {model.files} or that version"
                )

    def dit_header(self) -> DitHeader[Flux2Config]:
        """Read the transformer file's header; raise OptionError if it belongs to another release."""
        header: DitHeader[Flux2Config] = super().dit_header()
        needs_guidance = self.version.defaults.embedded_guidance is not None
        other_version = None  # the first version with the file's width, if the width is not the expected one
        if header.config.dim != self.version.dim:
            versions = (name for name, version in VERSIONS.items() if version.dim == header.config.dim)
            other_version = next(versions, None)
        if header.config.has_guidance != needs_guidance or other_version is not None:
            # with the expected width, only the guidance input differs
            fitting = other_version or ("klein-4b" if needs_guidance else "dev")
            raise OptionError(
                f"--dit {self.dit_path} is {describe(header)} of width {header.config.dim}, not that of "
                f"--model_version {self.model_version}. Pass the version of the file, such as {fitting}, or "
                "another file"
            )
        return header

    def load_vae(self, device: torch.device) -> Flux2Vae:
        """Load the VAE in the dtype and tile size that the options set."""
        return load_vae(self.vae_path, device, self.encoder_dtype(self.vae_dtype), self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the VAE of this model."""
        read_once(self.vae_path, read_vae)


def make_model_files(options: Flux2TrainingOptions | Flux2GenerationOptions) -> Flux2Files:
    """Return the model files that the options of a training run or generation specify."""
    files = Flux2Files(model_version=options.model_version).add_dit(options.dit, options.dit_dtype)
    return files.add_vae(options.vae.file).add_text(options.text)
