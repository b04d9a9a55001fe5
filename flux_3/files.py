"""Transformer files of FLUX 3, and the files of a run: transformer, FLUX.2's autoencoder and Qwen3-VL.

Transformers have the released names or diffusers'. Their tensors show whether they are base or distilled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from checkpoints.dialects import DitShapes, find_dialect, join_parts, joined_shapes, make_wrong_kind_error
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.model_files import read_once
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelFiles, qwen3_chat, qwen_tokenizer
from encoders.language_models import QWEN3_VL
from flux_2.vae import Flux2Vae, load_vae, read_vae
from flux_3.configs import AXES, JOINT_BLOCKS, MODALITY_BLOCK_LISTS, TEXT_LENGTH_MULTIPLE, Flux3Config
from flux_3.model import Flux3Model
from flux_3.names import FLUX_3
from flux_3.options import NAME
from modules.errors import CheckpointError, OptionError
from networks.names.layouts import swapped_tensors, tensor_patterns
from protocols.loading import TensorSource

TEXT_STATES_KEY = "ctx_vec"
MODEL_LABEL = f"a {NAME} transformer"
DIT_OPTION, SAMPLE_DIT_OPTION = "--dit", "--distilled_dit"
RELEASED_FILES = (
    "flux-3-image-klein-base.safetensors or flux-3-image-klein.safetensors, or the folder transformer of "
    "either release in diffusers layout"
)
# dialect -> a tensor that only it has, its names
DIALECTS = {
    "released": ("early_stream_modulations.image.lin.weight", ()),
    "diffusers": ("early_stream_modulations.image.linear.weight", tensor_patterns(FLUX_3)),
}
_BEFORE, _AFTER = qwen3_chat(thinks=True)  # the instruct model's template has no thoughts at all
_SOURCE = qwen_tokenizer("--text_encoder_tokenizer", "Qwen/Qwen3-VL-4B-Instruct")
# inside the encoder's folder; next to a file; next to text_encoder (diffusers)
TOKENIZER_FOLDERS = (".", "qwen_3_vl", "tokenizer", "../tokenizer")
FLUX_3_USE = LanguageEncoderSettings(
    name="qwen3_vl",
    states_key=TEXT_STATES_KEY,
    model=QWEN3_VL,
    source=replace(_SOURCE, files=replace(_SOURCE.files, folder="", folders=TOKENIZER_FOLDERS)),
    max_length=8192,
    template_prefix=_BEFORE,
    template_suffix=_AFTER,
    states=(4, 8, 12, 16, 20, 24, 28, 32),
    pad_token="<|endoftext|>",
    pad_to_multiple_of=TEXT_LENGTH_MULTIPLE,
    batch_size=1,  # as released
)


def _read_header(checkpoint: Checkpoint) -> DitHeader[Flux3Config]:
    names = checkpoint.tensors
    dialect = find_dialect(DIALECTS, names)
    if dialect is None:
        raise make_wrong_kind_error(checkpoint, MODEL_LABEL, DIT_OPTION, RELEASED_FILES)
    stored_shapes = {name: info.shape for name, info in names.items()}
    shapes = DitShapes(checkpoint.path, joined_shapes(stored_shapes, DIALECTS[dialect][1]), NAME)
    config = _read_config(shapes)
    query = f"{JOINT_BLOCKS}.0.q_proj.weight"
    shapes.get_shape(query)  # that it is there
    if dialect == "diffusers":
        query = "single_transformer_blocks.0.attn.to_q.weight"
    return DitHeader(config, dialect, names[query].dtype)


def _read_config(shapes: DitShapes) -> Flux3Config:
    """Return the dimensions of a transformer. Raises CheckpointError if they do not match each other."""
    first = f"{JOINT_BLOCKS}.0"
    dim, channels = shapes.get_shape("emb_in.image.weight")
    (head_dim,) = shapes.get_shape(f"{first}.norm.query_norm.scale", axes=1)
    ffn_dim = shapes.get_shape(f"{first}.mlp_out.weight")[1]
    # rotary embedding: every axis rotates pairs of channels
    has_heads = dim % head_dim == 0 and head_dim % (2 * AXES) == 0
    # the feed-forward is gated: mlp_in computes the values and their gates
    if not has_heads or shapes.get_shape(f"{first}.mlp_in.weight")[0] != 2 * ffn_dim:
        raise CheckpointError(
            f"{shapes.path}: width {dim}, heads of {head_dim} and feed-forwards of {ffn_dim} do not fit "
            f"{MODEL_LABEL}. Copy the file again.",
            shapes.path,
        )
    # The number of blocks of each modality. Raises CheckpointError if one has fewer than another.
    counts = {name: shapes.count_blocks(name) for name in MODALITY_BLOCK_LISTS}
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise CheckpointError(
            f"{shapes.path}: blocks are missing ({numbers}). Copy the file again.", shapes.path
        )
    return Flux3Config(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=dim // head_dim,
        mode_blocks=counts[MODALITY_BLOCK_LISTS[0]],
        joint_blocks=shapes.count_blocks(JOINT_BLOCKS),
        channels=channels,
        text_dim=shapes.get_shape("txt_in.weight")[1],
        freq_dim=shapes.get_shape("time_in.in_layer.weight")[1],
        is_flow_map="ref_time_in.in_layer.weight" in shapes.shapes,
    )


def _make_sources(checkpoint: Checkpoint, header: DitHeader[Flux3Config]) -> Mapping[str, TensorSource]:
    swapped = swapped_tensors(FLUX_3) if header.dialect == "diffusers" else ()
    return join_parts(list_tensor_sources(checkpoint), DIALECTS[header.dialect][1], swapped)


def describe(header: DitHeader[Flux3Config]) -> str:
    """Return the kind of a transformer file for messages: base or distilled."""
    release = "distilled" if header.config.is_flow_map else "base"
    return f"the {release} {NAME} Klein transformer"


FORMAT = DitFormat(
    _read_header,
    describe,
    network=Flux3Model,
    sources=_make_sources,
    option=DIT_OPTION,
    ignore=("repa_projectors.*",),  # layers of pre-training that are left in some files
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@dataclass(frozen=True)
class Flux3Files(LanguageModelFiles):
    """Model files of a run: the transformer, FLUX.2's autoencoder and Qwen3-VL's language model."""

    needs_distilled: bool | None = None  # None: base or distilled; False: base, to train it

    format: ClassVar = FORMAT
    vae_folder: ClassVar[str] = "vae"
    encoder_settings: ClassVar[LanguageEncoderSettings] = FLUX_3_USE

    @property
    def dit_path(self) -> Path:
        """Return the transformer's path, or for a diffusers release its subfolder `transformer`."""
        path = super().dit_path
        inner = path / "transformer"
        return inner if inner.is_dir() else path

    def dit_header(self) -> DitHeader[Flux3Config]:
        """Read the transformer file's header.

        Raises OptionError if the file is the base model and the options require the distilled one, or the
        reverse.
        """
        header: DitHeader[Flux3Config] = super().dit_header()
        is_distilled = header.config.is_flow_map
        if self.needs_distilled is False and is_distilled:
            raise OptionError(
                f"--dit {self.dit_path} is {describe(header)}, which cannot be trained: it predicts the mean "
                "velocity of a jump between two noise levels, and the loss of a training is that of one "
                "level. Train on base (flux-3-image-klein-base), whose LoRAs work on the distilled model "
                f"too, and pass this file to {SAMPLE_DIT_OPTION} for samples"
            )
        if self.needs_distilled and not is_distilled:
            raise OptionError(
                f"{SAMPLE_DIT_OPTION} {self.dit_path} is {describe(header)}. Pass the distilled file "
                "(flux-3-image-klein), or omit the option: samples are then made by --dit"
            )
        return header

    def load_vae(self, device: torch.device) -> Flux2Vae:
        """Load the VAE in the dtype and tile size that the options set."""
        return load_vae(self.vae_path, device, self.encoder_dtype(self.vae_dtype), self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the VAE of this model."""
        read_once(self.vae_path, read_vae)
