"""Transformer files of ERNIE-Image, and a run's files: transformer, FLUX.2's autoencoder and Ministral 3.

Transformers have the released names, which are those of diffusers. Base and Turbo have equal tensors: only
names distinguish them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from checkpoints.dialects import DitShapes, make_wrong_kind_error
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.model_files import inside, read_once
from checkpoints.opening import Checkpoint, list_tensor_sources
from checkpoints.tokenizers import TokenizerFiles
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelFiles
from encoders.language_models import MINISTRAL3
from encoders.text_encoder import TokenizerSource
from ernie_image.configs import VARIANCE_EPS, ErnieImageConfig
from ernie_image.model import END_MODULATION_ROWS, MODULATION_ROWS, ErnieImageModel
from ernie_image.options import NAME
from flux_2.vae import Flux2Vae, load_vae, read_vae
from modules.errors import CheckpointError
from protocols.loading import TensorSource

TEXT_STATES_KEY = "ministral3_embed"
MODEL_LABEL = f"an {NAME} transformer"
DIT_OPTION = "--dit"
RELEASED_FILES = (
    "ernie-image.safetensors or ernie-image-turbo.safetensors of Comfy-Org, or the folder transformer of "
    "baidu/ERNIE-Image or baidu/ERNIE-Image-Turbo"
)
IDENTIFYING_TENSOR = "layers.0.adaLN_sa_ln.weight"
MODULATION = "adaLN_modulation.1.weight"
TOKENIZER_FILES = TokenizerFiles(
    option="--text_encoder_tokenizer",
    names=("tokenizer.json",),
    folder="tokenizer",
    repository="baidu/ERNIE-Image",
    # inside the encoder's folder; next to a single file; next to text_encoder (diffusers)
    folders=(".", "ministral_3", "tokenizer", "../tokenizer"),
    unique_token="[INST]",
)
ENCODER_SETTINGS = LanguageEncoderSettings(
    name="ministral3",
    states_key=TEXT_STATES_KEY,
    model=MINISTRAL3,
    # the begin token is written here, because a tokenizer.json need not add it
    source=TokenizerSource(TOKENIZER_FILES, adds_own=False),
    # longer than any caption; trainers cut at 512, diffusers nowhere
    max_length=2048,
    template_prefix="<s>",  # captions have no other template
    states=(-2,),  # behind the layer before the last
    batch_size=1,  # so that a state does not depend on other prompts, to the last bit
)


def _read_header(checkpoint: Checkpoint) -> DitHeader[ErnieImageConfig]:
    """Return the dimensions and dtype of an ERNIE-Image file."""
    if IDENTIFYING_TENSOR not in checkpoint.tensors:
        raise make_wrong_kind_error(checkpoint, MODEL_LABEL, DIT_OPTION, RELEASED_FILES)
    file_shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    config = _read_config(DitShapes(checkpoint.path, file_shapes, NAME))
    query = "layers.0.self_attention.to_q.weight"
    return DitHeader(config, "released", checkpoint.tensors[query].dtype)


def _read_config(shapes: DitShapes) -> ErnieImageConfig:
    """Return the dimensions of a transformer. Raises CheckpointError if they do not match each other."""
    dim, text_dim = shapes.get_shape("text_proj.weight")
    (head_dim,) = shapes.get_shape("layers.0.self_attention.norm_q.weight", axes=1)
    ffn_dim = shapes.get_shape("layers.0.mlp.linear_fc2.weight")[1]
    channels = shapes.get_shape("final_linear.weight")[0]
    fits = (
        dim % head_dim == 0
        and head_dim % 16 == 0  # the shares of the three axes are even
        and shapes.get_shape("layers.0.self_attention.to_q.weight") == (dim, dim)
        and shapes.get_shape("layers.0.mlp.gate_proj.weight") == (ffn_dim, dim)
        and shapes.get_shape("time_embedding.linear_1.weight") == (dim, dim)
        and shapes.get_shape("x_embedder.proj.weight", axes=4)[:2] == (dim, channels)
        and shapes.get_shape(MODULATION) == (MODULATION_ROWS * dim, dim)
        and shapes.get_shape("final_norm.linear.weight") == (END_MODULATION_ROWS * dim, dim)
    )
    if not fits:
        raise CheckpointError(
            f"{shapes.path}: width {dim}, heads of {head_dim} and feed-forwards of {ffn_dim} do not fit "
            f"{MODEL_LABEL}. Copy the file again.",
            shapes.path,
        )
    return ErnieImageConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=dim // head_dim,
        num_layers=shapes.count_blocks("layers"),
        channels=channels,
        text_dim=text_dim,
    )


def _make_sources(checkpoint: Checkpoint, _: DitHeader[ErnieImageConfig]) -> Mapping[str, TensorSource]:
    return list_tensor_sources(checkpoint)


FORMAT = DitFormat(
    _read_header,
    lambda _: MODEL_LABEL,
    network=ErnieImageModel,
    sources=_make_sources,
    option=DIT_OPTION,
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@dataclass(frozen=True)
class ErnieImageFiles(LanguageModelFiles):
    """Model files of a run: the transformer, FLUX.2's autoencoder and Ministral 3's language model."""

    format: ClassVar = FORMAT
    vae_folder: ClassVar[str] = "vae"
    encoder_settings: ClassVar[LanguageEncoderSettings] = ENCODER_SETTINGS

    @property
    def dit_path(self) -> Path:
        """Return the transformer's path, or for a release folder its subfolder `transformer`."""
        return inside(super().dit_path, "transformer")

    def load_vae(self, device: torch.device) -> Flux2Vae:
        """Load the VAE in the dtype and tile size that the options set."""
        dtype = self.encoder_dtype(self.vae_dtype)
        return load_vae(self.vae_path, device, dtype, self.vae_tile, variance_eps=VARIANCE_EPS)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the VAE of this model."""
        read_once(self.vae_path, read_vae)
