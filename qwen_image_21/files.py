"""Transformer files of Qwen-Image-2.1, Turbo's noise levels, and the files of a run.

Files have the names of diffusers, which are the released ones, or ComfyUI's, which stack two layers of each
block. Base and Turbo have equal tensors; see `find_turbo`.
"""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch

from checkpoints.dialects import DitShapes, cut_parts, make_wrong_kind_error, parted_shapes
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.encoders import declared_settings
from checkpoints.model_files import inside
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.files import judge_distillation
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelFiles
from encoders.language_models import QWEN3_VL
from encoders.picture_prompts import ImagePromptFormat
from modules.errors import CheckpointError, OptionError
from modules.text_files import parse_json, read_text
from networks.names.layouts import joined_tensors
from protocols.loading import TensorSource
from qwen_image.files import QWEN_SETTINGS, TOKENIZER
from qwen_image_21.caches import SEEN_HASHES, SIZES, SLOTS, hash_images
from qwen_image_21.configs import FEW_STEPS, QwenImage21Config, default_axes
from qwen_image_21.model import QwenImage21Model
from qwen_image_21.names import QWEN_IMAGE_21
from qwen_image_21.options import BLANK, NAME
from qwen_image_21.references import lay_on_white, read_encoder_image
from qwen_image_21.vae import QwenImage21Vae, load_vae, read_vae_config

KEY = "vl_embed"  # key in musubi-tuner's caches
MAX_TOKENS = 8192  # maximum length of a prompt, up to which positions are trained
_SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
ENCODER_SETTINGS = LanguageEncoderSettings(
    name="vl",
    states_key=KEY,
    model=replace(
        QWEN3_VL,
        word_key="qwen3vl_8b",
        files="qwen3vl_8b_bf16.safetensors of Comfy-Org, or the folder of Qwen/Qwen3-VL-8B-Instruct,",
    ),
    source=replace(
        QWEN_SETTINGS.source,
        files=replace(
            TOKENIZER,
            repository="Qwen/Qwen3-VL-8B-Instruct",
            folders=(".", "qwen_3_vl", "tokenizer", "processor", "../tokenizer", "../processor"),
        ),
    ),
    max_length=MAX_TOKENS,
    template_prefix=f"{_SYSTEM}<|im_start|>user\n",
    template_suffix="<|im_end|>\n<|im_start|>assistant\n",
    num_dropped_tokens=None,
    system=_SYSTEM,
    empty_prompt_text=BLANK,
    pre_norm=True,
    keeps_template_suffix=True,
    batch_size=1,  # so that a state does not depend on other prompts, to the last bit
    image_format=ImagePromptFormat(
        "<image{number}><|vision_start|>{tokens}<|vision_end|>",
        read=read_encoder_image,
        show=lay_on_white,
        hash_images=hash_images,
        min_pixels=1,  # no limits: the images already have their final sizes
        max_pixels=1 << 40,
        between=" ",
        loads_tower_at_once=False,
    ),
    image_positions_key=SLOTS,
    image_sizes_key=SIZES,
    image_hashes_key=SEEN_HASHES,
)
MAX_REFERENCES = 10  # references
MODEL_KIND = f"a {NAME} transformer"
DIT_OPTION = "--dit"
FILES = (
    "qwen_image_2.1_bf16.safetensors of Comfy-Org, or the folder transformer of Qwen/Qwen-Image-2.1 or "
    "Qwen/Qwen-Image-2.1-Turbo"
)
CLASSES = ("QwenImage21Transformer2DModel",)  # in a config.json
IDENTIFYING_TENSOR = "txt_in.text_norm.weight"
QUERY_WEIGHT = "transformer_blocks.0.attn.to_q.weight"  # its dtype counts as the file's
FUSED_LAYERS = joined_tensors(QWEN_IMAGE_21)
# noise levels of Turbo before the shift, if no model_index.json states them. Source: that of the release
TURBO_LEVELS = (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568)
MAX_LEVELS = 1000


def _read_header(checkpoint: Checkpoint, config_json: Path | None) -> DitHeader[QwenImage21Config]:
    """Return dimensions, tensor naming and dtype of a transformer file."""
    # Settings are read from --dit_config or the config.json next to it.
    names = checkpoint.tensors
    # Qwen-Image-2.1 shares one modulation among all blocks; Qwen-Image has one in each block
    has_modulation = "modulation.1.weight" in names and "transformer_blocks.0.img_mod.1.weight" not in names
    if IDENTIFYING_TENSOR not in names or not has_modulation:
        raise make_wrong_kind_error(checkpoint, MODEL_KIND, DIT_OPTION, FILES)
    controls = [name for name in names if name.startswith("control_")]
    if controls:
        raise CheckpointError(
            f"{checkpoint.path} contains a ControlNet ({controls[0]}), which is not supported yet.\n"
            f"  Pass {FILES}.",
            checkpoint.path,
        )
    file_shapes = {name: info.shape for name, info in names.items()}
    shapes = DitShapes(checkpoint.path, parted_shapes(file_shapes, FUSED_LAYERS), NAME)
    if config_json is None:
        source, settings = declared_settings(checkpoint, CLASSES)
    else:
        source, settings = config_json, _read_config_json(config_json)
    dialect = "comfy" if "transformer_blocks.0.img_mlp.gate_up.weight" in names else "diffusers"
    return DitHeader(_read_config(shapes, source, settings), dialect, names[QUERY_WEIGHT].dtype)


def _read_config_json(path: Path) -> Mapping[str, Any]:
    """Return the settings in --dit_config; raise CheckpointError if they belong to another model."""
    try:
        settings = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"--dit_config {path} cannot be read ({error}). Pass config.json of the folder transformer.", path
        ) from error
    if not isinstance(settings, dict) or settings.get("_class_name", CLASSES[0]) not in CLASSES:
        raise CheckpointError(
            f"--dit_config {path} is not the configuration of {MODEL_KIND}. Pass config.json of its folder "
            "transformer, or omit the option.",
            path,
        )
    return settings


def _read_config(shapes: DitShapes, source: Path, settings: Mapping[str, Any]) -> QwenImage21Config:
    """Return the dimensions of a transformer."""
    # `settings` is the content of `source`, a config.json; {} without one.
    dim, channels = shapes.get_shape("img_in.weight")
    (head_dim,) = shapes.get_shape("transformer_blocks.0.attn.norm_q.weight", axes=1)
    rows, columns = shapes.get_shape(QUERY_WEIGHT)
    if rows != dim or columns != dim or dim % head_dim or head_dim % 2:
        raise CheckpointError(
            f"{shapes.path}: {rows} rows of queries in blocks of width {dim} with heads of {head_dim} do "
            f"not fit {MODEL_KIND}. Copy the file again.",
            shapes.path,
        )
    num_layers = shapes.count_blocks("transformer_blocks")
    dimensions = {
        "num_layers": num_layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "in_channels": channels,
    }
    _check_settings(settings, source, dimensions, shapes.path)
    if not settings:
        # Raise CheckpointError if a file has fewer blocks than the released model of this width
        released = dict(dict(QWEN_IMAGE_21.released_sizes).get(dim, ()))
        if num_layers < released.get("transformer_blocks", 0):
            raise CheckpointError(
                f"{shapes.path}: {num_layers} of {released['transformer_blocks']} blocks are present. Pass "
                "the complete file, or for a smaller network its config.json to --dit_config.",
                shapes.path,
            )
    eps = settings.get("eps", QwenImage21Config.eps)
    if type(eps) is not float or not 0 <= eps < 1:
        raise CheckpointError(f"{source}: eps is {eps}: it must be a small number, such as 1e-6.", source)
    return QwenImage21Config(
        dim=dim,
        ffn_dim=shapes.get_shape("transformer_blocks.0.img_mlp.gate_layer.weight")[0],
        num_heads=dim // head_dim,
        num_layers=num_layers,
        channels=channels,
        text_dim=shapes.get_shape("txt_in.in_layer.weight")[1],
        axes=_read_axes(settings, source, head_dim),
        freq_dim=shapes.get_shape("time_text_embed.timestep_embedder.linear_1.weight")[1],
        eps=eps,
    )


def _check_settings(
    settings: Mapping[str, Any], source: Path, dimensions: Mapping[str, int], path: Path
) -> None:
    """Raise CheckpointError if a config.json, `source`, is for another network or another file."""
    # `dimensions` follow from the tensors of the file `path`, by setting name.
    # settings that the tensors do not show; the network supports only the released values
    for name, value in (("patch_size", 1), ("causal_condition", True)):
        if settings.get(name, value) != value:
            raise CheckpointError(
                f"{source}: {name} is {settings[name]}, but {NAME} was released with {value}: other networks "
                "are not supported.",
                source,
            )
    for name, value in dimensions.items():
        if settings.get(name, value) != value:
            raise CheckpointError(
                f"{source}: {name} is {settings[name]}, but {path} has {value}. The configuration "
                "belongs to a different file: pass the right one, or copy the file again.",
                source,
            )


def _read_axes(settings: Mapping[str, Any], source: Path, width: int) -> tuple[int, int, int]:
    """Return a head's channels for each position axis; raise CheckpointError if they do not fit its width."""
    axes = settings.get("axes_dims_rope", default_axes(width))
    is_list = isinstance(axes, list | tuple) and len(axes) == 3
    if not is_list or not all(type(axis) is int and axis > 0 and axis % 2 == 0 for axis in axes):
        axes = ()
    if sum(axes) != width:
        raise CheckpointError(
            f"{source}: axes_dims_rope {settings.get('axes_dims_rope', '')} must be three even numbers, "
            f"{width} together, as many as a head has channels.",
            source,
        )
    times, rows, columns = axes
    return times, rows, columns


def _make_sources(checkpoint: Checkpoint, _: DitHeader[QwenImage21Config]) -> Mapping[str, TensorSource]:
    return cut_parts(list_tensor_sources(checkpoint), FUSED_LAYERS)


@functools.cache  # so that headers that were read are found again
def make_format(config_json: Path | None) -> DitFormat[QwenImage21Config, QwenImage21Model]:
    """Return the format of transformer files; `config_json` is the path from --dit_config."""
    return DitFormat(
        functools.partial(_read_header, config_json=config_json),
        lambda _: MODEL_KIND,
        network=QwenImage21Model,
        sources=_make_sources,
        option=DIT_OPTION,
    )


FORMAT = make_format(None)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


class Turbo(NamedTuple):
    """Sampling settings of a transformer distilled to few steps."""

    levels: tuple[float, ...]  # noise levels before the shift, without the 0 at the end
    source: str  # what says that it is Turbo


def find_turbo(dit: Path | None) -> Turbo | None:
    """Return Turbo's noise levels, with the evidence that a transformer is Turbo; None if it is not Turbo.

    The evidence is `sample_sigmas` of the release's model_index.json, else a word such as "turbo" in the name
    of the file or a folder around it. Raises CheckpointError if model_index.json cannot be used.
    """
    if dit is None:
        return None
    dit = inside(dit, "transformer")
    folder = dit.absolute().parent if dit.suffix else dit.absolute()
    index = folder.parent / "model_index.json"
    if folder.name == "transformer" and index.is_file():
        levels = _read_levels(index)
        if levels is not None:
            return Turbo(levels, f"{index} has sample_sigmas")
    verdict = judge_distillation(FEW_STEPS, dit)
    if verdict is None or not verdict.is_distilled:
        return None
    return Turbo(TURBO_LEVELS, verdict.evidence)


def _read_levels(index: Path) -> tuple[float, ...] | None:
    """Return the noise levels `sample_sigmas` of a model_index.json; None if it has none."""
    try:
        content = parse_json(read_text(index))
        levels = content.get("sample_sigmas")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}). Copy it again.", index) from error
    if levels is None:
        return None
    if not _are_falling_levels(levels):
        raise CheckpointError(
            f"{index}: sample_sigmas must be falling numbers from 1 down to above 0, at most {MAX_LEVELS}. "
            "Copy the file of the release again.",
            index,
        )
    return tuple(map(float, levels))


def _are_falling_levels(levels: Any) -> bool:
    """Return whether a JSON value is a list of decreasing noise levels, above 0 and up to 1."""
    if not isinstance(levels, list) or not 0 < len(levels) <= MAX_LEVELS:
        return False
    if not all(type(level) in (int, float) and 0 < level <= 1 for level in levels):
        return False
    return all(level > next_level for level, next_level in itertools.pairwise(levels))


@dataclass(frozen=True)
class QwenImage21Files(LanguageModelFiles):
    """Model files of a run: the transformer, the model's own VAE and Qwen3-VL's language model."""

    encoder_settings: LanguageEncoderSettings = ENCODER_SETTINGS
    dit_config: Path | None = None

    vae_folder: ClassVar[str] = "vae"

    def add_config(self, path: Path | None) -> Self:
        """Return a copy of these files with --dit_config added; raise OptionError if that file is missing."""
        if path is not None and not path.is_file():
            raise OptionError(f"--dit_config {path}: no such file. Correct the path, or omit the option")
        return replace(self, dit_config=path)

    @property
    def format(self) -> DitFormat[Any, Any]:  # type: ignore[override]  # depends on --dit_config
        """Format of transformer files, which depends on --dit_config."""
        return make_format(self.dit_config)

    @property
    def dit_path(self) -> Path:
        """Return the transformer's path, or for a release folder its subfolder `transformer`."""
        return inside(super().dit_path, "transformer")

    def load_vae(self, device: torch.device) -> QwenImage21Vae:
        """Load the VAE in the dtype and tile size that the options set."""
        self.check_vae()
        return load_vae(self.vae_path, device, self.encoder_dtype(self.vae_dtype), tile=self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the model's VAE, or its latents do not fit --dit."""
        channels = read_vae_config(self.vae_path).latent_channels
        if self.dit is not None and self.dit_header().config.channels != channels:
            raise CheckpointError(
                f"--vae {self.vae_path} has latents of {channels} channels, {self.dit_path} takes "
                f"{self.dit_header().config.channels}. Pass the VAE of {NAME}.",
                self.vae_path,
            )

    @property
    def channels(self) -> int | None:
        """Return the latent channels of the run's files; None if no option names a file."""
        if self.dit is not None:
            channels: int = self.dit_header().config.channels
            return channels
        return None if self.vae is None else read_vae_config(self.vae_path).latent_channels
