"""Transformer files of Kandinsky 5, and a run's files: transformer, VAE, Qwen2.5-VL and CLIP-L.

Transformers have the released names, which are those of diffusers. Files of a size have equal tensors: only
names and --task distinguish them.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from checkpoints.dialects import DitShapes, make_wrong_kind_error
from checkpoints.dits import DitFormat, DitHeader, own_names
from checkpoints.encoders import check_state_width
from checkpoints.model_files import inside, read_once, require_file
from checkpoints.opening import Checkpoint
from encoders.autoencoder import load_autoencoder, read_autoencoder_header
from encoders.clip_l import PooledClip
from encoders.files import TransformerFiles
from encoders.language_encoder import LanguageModelEncoder
from encoders.language_models import read_language_model
from hunyuan_model.vae import load_vae
from hunyuan_model.vae_checkpoints import read_vae
from kandinsky.configs import (
    DEFAULT_TASK,
    DIM_BY_SIZE,
    I2V,
    LATENT_CHANNELS,
    LITE,
    NAME,
    PATCH,
    PRO,
    T2I,
    T2V,
    TASKS,
    KandinskyConfig,
    KandinskyTask,
    guess_task,
)
from kandinsky.model import FINAL_ROWS, TEXT_ROWS, VISUAL_ROWS, KandinskyModel
from kandinsky.options import KandinskyTextOptions, KandinskyVaeOptions
from kandinsky.text_encoders import (
    CLIP_OPTION,
    CLIP_SETTINGS,
    POOLED_CLIP,
    QWEN_OPTION,
    TOKENIZER,
    get_language_settings,
)
from modules.devices import select_compute_dtype
from modules.errors import CheckpointError, OptionError
from modules.speed_options import text_form
from protocols.family import TextEncoder

logger = logging.getLogger(__name__)

DESCRIPTION = f"a {NAME} transformer"
DIT_OPTION = "--dit"
RELEASED_FILES = (
    "kandinsky5lite_t2v_sft_5s.safetensors or another transformer of kandinskylab, or the folder transformer "
    "of one of their releases for diffusers"
)
IDENTIFYING_TENSOR = "visual_transformer_blocks.0.cross_attention.to_query.weight"
CONDITIONED_CHANNELS = 2 * LATENT_CHANNELS + 1  # noisy latents, condition, mask


def _read_header(checkpoint: Checkpoint) -> DitHeader[KandinskyConfig]:
    """Return the dimensions and dtype of a Kandinsky 5 file."""
    if IDENTIFYING_TENSOR not in checkpoint.tensors:
        raise make_wrong_kind_error(checkpoint, DESCRIPTION, DIT_OPTION, RELEASED_FILES)
    file_shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    config = _read_config(DitShapes(checkpoint.path, file_shapes, NAME))
    return DitHeader(config, "released", checkpoint.tensors[IDENTIFYING_TENSOR].dtype)


def _read_config(shapes: DitShapes) -> KandinskyConfig:
    """Return the dimensions of a transformer. Raises CheckpointError if they do not match each other."""
    dim, token_width = shapes.get_shape("visual_embeddings.in_layer.weight")
    block = "visual_transformer_blocks.0"
    (head_width,) = shapes.get_shape(f"{block}.self_attention.query_norm.weight", axes=1)
    ffn_dim = shapes.get_shape(f"{block}.feed_forward.in_layer.weight")[0]
    time_dim = shapes.get_shape("time_embeddings.in_layer.weight")[0]
    out_channels = shapes.get_shape("out_layer.out_layer.weight")[0] // PATCH**2
    in_channels = token_width // PATCH**2
    text_block = "text_transformer_blocks.0"
    fits = (
        dim % head_width == 0
        and head_width % 16 == 0  # the shares of the three axes are even
        and in_channels in (LATENT_CHANNELS, CONDITIONED_CHANNELS)
        and out_channels == LATENT_CHANNELS
        and shapes.get_shape(IDENTIFYING_TENSOR) == (dim, dim)
        and shapes.get_shape(f"{block}.visual_modulation.out_layer.weight") == (VISUAL_ROWS * dim, time_dim)
        and shapes.get_shape(f"{text_block}.text_modulation.out_layer.weight") == (TEXT_ROWS * dim, time_dim)
        and shapes.get_shape("out_layer.modulation.out_layer.weight") == (FINAL_ROWS * dim, time_dim)
    )
    if not fits:
        raise CheckpointError(
            f"{shapes.path}: width {dim}, heads of {head_width}, {in_channels} input and {out_channels} "
            f"output channels do not fit {DESCRIPTION}. Pass {RELEASED_FILES} to {DIT_OPTION}.",
            shapes.path,
        )
    return KandinskyConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        head_width=head_width,
        num_layers=shapes.count_blocks("visual_transformer_blocks"),
        text_layers=shapes.count_blocks("text_transformer_blocks"),
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=shapes.get_shape("text_embeddings.in_layer.weight")[1],
        pooled_dim=shapes.get_shape("pooled_text_embeddings.in_layer.weight")[1],
        time_dim=time_dim,
    )


FORMAT = DitFormat(
    _read_header, lambda _: DESCRIPTION, network=KandinskyModel, sources=own_names, option=DIT_OPTION
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@dataclass(frozen=True)
class KandinskyFiles(TransformerFiles):
    """Model files of a run: transformer, HunyuanVideo's or FLUX.1's VAE, Qwen2.5-VL and CLIP-L."""

    task: KandinskyTask = DEFAULT_TASK
    vae_chunk_size: int | None = None
    text_encoder_qwen: Path | None = None
    text_encoder_qwen_tokenizer: Path | None = None
    text_encoder_clip: Path | None = None
    text_encoder_clip_tokenizer: Path | None = None
    text_form: str | None = None
    text_on_cpu: bool = False

    format: ClassVar = FORMAT
    vae_folder: ClassVar[str] = "vae"

    def add_vae_options(self, options: KandinskyVaeOptions) -> "KandinskyFiles":
        """Return a copy with the VAE's path and settings from `options`."""
        return replace(self.add_vae(options.file), vae_chunk_size=options.vae_chunk_size)

    def add_text(self, options: KandinskyTextOptions) -> "KandinskyFiles":
        """Return a copy with the text encoders' paths and settings from `options`."""
        return replace(
            self,
            text_encoder_qwen=options.text_encoder_qwen,
            text_encoder_qwen_tokenizer=options.text_encoder_qwen_tokenizer,
            text_encoder_clip=options.text_encoder_clip,
            text_encoder_clip_tokenizer=options.text_encoder_clip_tokenizer,
            text_dtype=select_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            text_form=text_form(options),
            text_on_cpu=options.text_encoder_cpu,
        )

    @property
    def dit_path(self) -> Path:
        """Return the transformer's path, or for a release folder its subfolder `transformer`."""
        return inside(super().dit_path, "transformer")

    def check_task(self) -> None:
        """Raise OptionError if --task is for another transformer than the one of --dit."""
        config = self.dit_header().config
        if config.has_condition != (not self.task.makes_images):
            made = "clips" if config.has_condition else "images"
            remedy = guess_task("", config.dim, config.has_condition).name
            raise OptionError(
                f"--task {self.task.name}: {self.dit_path} makes {made} (it has {config.in_channels} input "
                f"channels). Use --task {remedy}, or pass another file to {DIT_OPTION}"
            )
        released = {dim: size for size, dim in DIM_BY_SIZE.items()}
        size = released.get(config.dim, self.task.size)
        if size != self.task.size:
            remedy = self.task.name.replace(f"-{self.task.size}-", f"-{size}-").replace("-hd", "-sd")
            raise OptionError(
                f"--task {self.task.name}: {self.dit_path} is of the size {size} (width {config.dim}). Use "
                f"--task {remedy}, or pass another file to {DIT_OPTION}"
            )

    @property
    def qwen_path(self) -> Path:
        """Return Qwen2.5-VL's path; raise OptionError if --text_encoder_qwen is missing."""
        return require_file(
            self.text_encoder_qwen, QWEN_OPTION, "Qwen2.5-VL's language model encodes the prompts"
        )

    @property
    def clip_path(self) -> Path:
        """Return CLIP-L's path; raise OptionError if --text_encoder_clip is missing."""
        return require_file(self.text_encoder_clip, CLIP_OPTION, "CLIP-L encodes the prompts too")

    def language_model(self) -> LanguageModelEncoder:
        """Return the language model's encoder; its file is opened when it is loaded."""
        return LanguageModelEncoder(
            get_language_settings(self.task),
            self.qwen_path,
            dtype=self.encoder_dtype(self.text_dtype),
            tokenizer=self.text_encoder_qwen_tokenizer,
            form=self.text_form,
            on_cpu=self.text_on_cpu,
        )

    def pooled_clip(self) -> PooledClip:
        """Return CLIP-L's encoder; its file is opened when it is loaded."""
        dtype = self.encoder_dtype(self.text_dtype)
        return PooledClip(self.clip_path, dtype, self.text_encoder_clip_tokenizer, POOLED_CLIP)

    def text_encoders(self) -> list[TextEncoder]:
        """Return the language model and CLIP-L, whose weights are read when they are loaded."""
        return [self.language_model(), self.pooled_clip()]

    def load_vae(self, device: torch.device) -> Any:
        """Load HunyuanVideo's VAE, or for images FLUX.1's without its shift."""
        dtype = self.encoder_dtype(self.vae_dtype)
        if self.task.makes_images:
            return load_autoencoder(self.vae_path, device, dtype, self.vae_tile, shift=0.0)
        return load_vae(self.vae_path, device, dtype, chunk_size=self.vae_chunk_size, tile=self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the VAE of the task."""
        if self.task.makes_images:
            read_autoencoder_header(self.vae_path, self.vae_option)
        else:
            read_once(self.vae_path, read_vae)

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check that text encoders, if given or `needed`, fit their options and the transformer."""
        if self.text_encoder_qwen is not None or needed:
            path = self.language_model().path
            width = read_once(path, _read_text_width)
            dit_width = None if config is None else config.text_dim
            check_state_width(QWEN_OPTION, path, width, self.dit, dit_width, CLIP_SETTINGS.model.files)
        if self.text_encoder_clip is not None or needed:
            path = self.pooled_clip().path
            width = read_once(path, POOLED_CLIP.read_width)
            dit_width = None if config is None else config.pooled_dim
            check_state_width(CLIP_OPTION, path, width, self.dit, dit_width, POOLED_CLIP.release)
        if self.text_encoder_qwen_tokenizer is not None:
            TOKENIZER.check_option_value(self.text_encoder_qwen_tokenizer)
        if self.text_encoder_clip_tokenizer is not None:
            POOLED_CLIP.tokenizer.check_option_value(self.text_encoder_clip_tokenizer)


def _read_text_width(checkpoint: Checkpoint) -> int:
    return read_language_model(checkpoint, CLIP_SETTINGS.model, CLIP_SETTINGS.states).config.dim


def select_task(name: str | None, dit: Path | None, vae: Path | None = None) -> KandinskyTask:
    """Return the task that --task names, or the one that the files suggest.

    Args:
        name: Value of --task; None if it is not given.
        dit: Value of --dit; None if it is not given.
        vae: Value of --vae, which tells clips from images if there is no transformer.
    """
    if name is not None:
        task = TASKS[name]
        if dit is not None:
            _warn_of_other_kind(task, dit)
        return task
    if dit is not None and not dit.exists():  # other checks report it
        return guess_task(
            dit.name, DIM_BY_SIZE[PRO if PRO in dit.name.lower() else LITE], T2I not in dit.name
        )
    if dit is not None:
        files = KandinskyFiles(dit=dit)
        config, path = files.dit_header().config, files.dit_path
        task = guess_task(_name_with_folders(path), config.dim, config.has_condition)
        logger.info("--task is %s: the size and the name of %s say so", task.name, path)
        return task
    if vae is not None and _is_image_vae(KandinskyFiles(vae=vae)):
        return TASKS["k5-lite-t2i-hd"]
    return DEFAULT_TASK


def _warn_of_other_kind(task: KandinskyTask, dit: Path) -> None:
    """Warn if a file is named as one that starts from an image, or from text, and the task says otherwise."""
    name = dit.name.lower()
    for kind, starts in ((T2V, "text"), (I2V, "an image")):
        if kind in name and kind != task.kind and not task.makes_images:
            logger.warning("--task %s, but %s is named as a file that starts from %s", task.name, dit, starts)


def _name_with_folders(path: Path) -> str:
    """Return the name of a file with those of two folders, of which one is that of its release."""
    return " ".join(part.name for part in (path.parent.parent, path.parent, path))


def _is_image_vae(files: KandinskyFiles) -> bool:
    """Return whether a file is FLUX.1's autoencoder."""
    try:
        read_autoencoder_header(files.vae_path)
    except CheckpointError:
        return False
    return True
