"""Transformer files of Kandinsky 5 and 6, and a run's files: transformer, VAEs, text encoders, vocoder.

Transformers of Kandinsky 5 have the released names, which are those of diffusers; those of Kandinsky 6 the
maker's or diffusers'. Files of a size have equal tensors: only names and --task distinguish them.
"""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
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
from checkpoints.encoders import check_state_width
from checkpoints.model_files import inside, read_once, require_file
from checkpoints.opening import Checkpoint, fingerprint, list_tensor_sources
from encoders.autoencoder import load_autoencoder, read_autoencoder_header
from encoders.clip_l import PooledClip
from encoders.files import TransformerFiles
from encoders.language_encoder import LanguageModelEncoder
from encoders.language_models import read_language_model
from hunyuan_model.vae import load_vae
from hunyuan_model.vae_checkpoints import read_vae
from kandinsky.audio import (
    AUDIO_VAE,
    HOP,
    RATE,
    VOCODER,
    AudioNetworks,
    Settings,
    audio_shape,
    load_audio_vae,
    load_vocoder,
    read_audio_vae,
    read_vocoder,
)
from kandinsky.configs import (
    AUDIO_CHANNELS,
    AUDIO_TASKS,
    DEFAULT_TASK,
    DIM_BY_SIZE,
    I2V,
    LATENT_CHANNELS,
    LITE,
    NAME,
    NAME_6,
    PATCH,
    PRO,
    T2I,
    T2V,
    TASKS,
    TI2VA,
    Kandinsky6Config,
    KandinskyConfig,
    KandinskyStream,
    KandinskyTask,
    guess_task,
)
from kandinsky.model import FINAL_ROWS, TEXT_ROWS, VISUAL_ROWS, KandinskyModel
from kandinsky.model_6 import Kandinsky6Model
from kandinsky.names import KANDINSKY_6
from kandinsky.options import KandinskyDecodingOptions, KandinskyTextOptions, KandinskyVaeOptions
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
from modules.speed_options import AttentionChoice, text_form
from networks.names.layouts import tensor_patterns
from protocols.data import AudioSpec
from protocols.family import TextEncoder
from protocols.loading import TensorSource

logger = logging.getLogger(__name__)

DESCRIPTION, DESCRIPTION_6 = f"a {NAME} transformer", f"a {NAME_6} transformer"
DIT_OPTION = "--dit"
RELEASED_FILES = (
    "kandinsky5lite_t2v_sft_5s.safetensors or another transformer of kandinskylab, or the folder transformer "
    "of one of their releases for diffusers"
)
AUDIO_SCALE = "audio_scale"  # in records of caches and, after ss_, in files of LoRAs
IDENTIFYING_TENSOR = "visual_transformer_blocks.0.cross_attention.to_query.weight"
CONDITIONED_CHANNELS = 2 * LATENT_CHANNELS + 1  # noisy latents, condition, mask
BLOCK_6, TEXT_BLOCK_6 = "visual_blocks.0", "{}_text_transformer_blocks.0"
# dialect -> a tensor that only its files have, its tensor names
DIALECTS: dict[str, tuple[str, Names]] = {
    "released": (IDENTIFYING_TENSOR, ()),
    "6": (f"{BLOCK_6}.videoT.self_attention.to_query.weight", ()),
    "6 diffusers": (
        "visual_transformer_blocks.0.video_dec_block.self_attention.to_query.weight",
        tensor_patterns(KANDINSKY_6),
    ),
}
Config = KandinskyConfig | Kandinsky6Config


def _read_header(checkpoint: Checkpoint) -> DitHeader[Config]:
    """Return the dimensions, the naming and the dtype of a file of Kandinsky 5 or 6."""
    dialect = find_dialect(DIALECTS, checkpoint.tensors)
    if dialect is None:
        raise make_wrong_kind_error(checkpoint, DESCRIPTION, DIT_OPTION, RELEASED_FILES)
    identifying_tensor, names = DIALECTS[dialect]
    file_shapes = joined_shapes({name: info.shape for name, info in checkpoint.tensors.items()}, names)
    shapes = DitShapes(checkpoint.path, file_shapes, NAME if dialect == "released" else NAME_6)
    config: Config = _read_config(shapes) if dialect == "released" else _read_config_6(shapes)
    return DitHeader(config, dialect, checkpoint.tensors[identifying_tensor].dtype)


def _make_sources(checkpoint: Checkpoint, header: DitHeader[Config]) -> Mapping[str, TensorSource]:
    return join_parts(list_tensor_sources(checkpoint), DIALECTS[header.dialect][1])


def _build(config: Config, attention: AttentionChoice) -> KandinskyModel | Kandinsky6Model:
    if isinstance(config, Kandinsky6Config):
        return Kandinsky6Model(config, attention)
    return KandinskyModel(config, attention)


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


def _read_config_6(shapes: DitShapes) -> Kandinsky6Config:
    """Return the dimensions of Kandinsky 6. Raises CheckpointError for a network distilled with PiFlow."""
    audio_channels = shapes.get_shape("audio_embeddings.in_layer.weight")[1]
    streams = {prefix: _read_stream(shapes, prefix) for prefix in ("video", "audio")}
    video, audio = streams["video"], streams["audio"]
    config = Kandinsky6Config(
        video=video,
        audio=audio,
        num_layers=shapes.count_blocks("visual_blocks"),
        text_layers=shapes.count_blocks("video_text_transformer_blocks"),
        in_channels=shapes.get_shape("visual_embeddings.in_layer.weight")[1] // PATCH**2,
        out_channels=shapes.get_shape("out_layer.out_layer.weight")[0] // PATCH**2,
        audio_channels=audio_channels,
        text_dim=shapes.get_shape("video_text_embeddings.in_layer.weight")[1],
        pooled_dim=shapes.get_shape("video_pooled_text_embeddings.in_layer.weight")[1],
        num_token_types=shapes.shapes.get("visual_token_type_embeddings.weight", (0,))[0],
    )
    predictions = shapes.get_shape("audio_outLayer.out_layer.weight")[0] / audio_channels
    if predictions > 1 and config.out_channels == predictions * LATENT_CHANNELS:
        raise CheckpointError(
            f"{shapes.path} was distilled with PiFlow: its output is {predictions:g} predictions in place of "
            "a velocity, which is neither trained nor generated with here. Pass the sft or the pretrain "
            f"release of {NAME_6} to {DIT_OPTION}.",
            shapes.path,
        )
    fits = (
        video.head_width == audio.head_width
        and video.head_width % 16 == 0  # the shares of the three axes are even
        and config.in_channels == CONDITIONED_CHANNELS
        and config.out_channels == LATENT_CHANNELS
        and predictions == 1
        and config.num_token_types in (0, 2)
        and shapes.get_shape(f"{BLOCK_6}.va_cross_attention.to_key.weight") == (video.dim, audio.dim)
        and shapes.get_shape(f"{BLOCK_6}.av_cross_attention.to_key.weight") == (audio.dim, video.dim)
        # with the gate of the other stream: a file without crossed gates has three rows of its own width
        and shapes.get_shape(f"{BLOCK_6}.va_modulation.out_layer.weight")
        == (2 * video.dim + audio.dim, video.time_dim)
        and shapes.get_shape(f"{BLOCK_6}.av_modulation.out_layer.weight")
        == (2 * audio.dim + video.dim, audio.time_dim)
    )
    if not fits:
        raise CheckpointError(
            f"{shapes.path}: widths {video.dim} and {audio.dim}, heads of {video.head_width} and "
            f"{audio.head_width}, {config.in_channels} input and {config.out_channels} output channels do "
            f"not fit {DESCRIPTION_6}. Copy the file again.",
            shapes.path,
        )
    return config


def _read_stream(shapes: DitShapes, prefix: str) -> KandinskyStream:
    """Return the dimensions of a stream, "video" or "audio", of Kandinsky 6."""
    block = f"{BLOCK_6}.{prefix}T"
    dim = shapes.get_shape(f"{block}.self_attention.to_query.weight")[0]
    (head_width,) = shapes.get_shape(f"{block}.self_attention.query_norm.weight", axes=1)
    time_dim = shapes.get_shape(f"{prefix}_time_embeddings.in_layer.weight")[0]
    fits = (
        dim % head_width == 0
        and shapes.get_shape(f"{block}.visual_modulation.out_layer.weight") == (VISUAL_ROWS * dim, time_dim)
        and shapes.get_shape(f"{TEXT_BLOCK_6.format(prefix)}.text_modulation.out_layer.weight")
        == (TEXT_ROWS * dim, time_dim)
    )
    if not fits:
        raise CheckpointError(
            f"{shapes.path}: the {prefix} has width {dim}, heads of {head_width} and times of {time_dim}, "
            f"which do not fit {DESCRIPTION_6}. Copy the file again.",
            shapes.path,
        )
    ffn_dim = shapes.get_shape(f"{block}.feed_forward.in_layer.weight")[0]
    return KandinskyStream(dim, ffn_dim, head_width, time_dim)


def _describe(header: DitHeader[Config]) -> str:
    return DESCRIPTION_6 if header.config.kind == TI2VA else DESCRIPTION


FORMAT = DitFormat(_read_header, _describe, network=_build, sources=_make_sources, option=DIT_OPTION)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@dataclass(frozen=True)
class KandinskyFiles(TransformerFiles):
    """Model files of a run: transformer, HunyuanVideo's or FLUX.1's VAE, text encoders, those of sound."""

    task: KandinskyTask = DEFAULT_TASK
    vae_chunk_size: int | None = None
    audio_vae: Path | None = None
    vocoder: Path | None = None
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
        return replace(
            self.add_vae(options.file),
            vae_chunk_size=options.vae_chunk_size,
            audio_vae=options.audio_vae,
            vocoder=options.vocoder if isinstance(options, KandinskyDecodingOptions) else None,
        )

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
        kind = self.task.kind if self.task.makes_images or self.task.has_audio else "video"
        if config.kind != kind:
            made = {"video": "clips without sound", T2I: "images", TI2VA: "clips with sound"}[config.kind]
            remedy = guess_task("", config.dim, config.kind).name
            raise OptionError(
                f"--task {self.task.name}: {self.dit_path} is {_describe(self.dit_header())} with "
                f"{config.in_channels} input channels and makes {made}. Use --task {remedy}, or pass "
                f"another file to {DIT_OPTION}"
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

    def check(self, needed: Collection[str] = ()) -> None:
        """Check the files that options name, those of the sound too, without loading them."""
        super().check(needed)
        self.check_audio()

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not the VAE of the task."""
        if self.task.makes_images:
            read_autoencoder_header(self.vae_path, self.vae_option)
        else:
            read_once(self.vae_path, read_vae)

    # sound

    @property
    def audio_vae_path(self) -> Path:
        """Return the path of the sound's VAE; raise OptionError if --audio_vae is missing."""
        path = require_file(self.audio_vae, AUDIO_VAE, "it turns sound into latents and back")
        return inside(path, "audio_vae")

    @property
    def vocoder_path(self) -> Path:
        """Return the vocoder's path; raise OptionError if --vocoder is missing."""
        return inside(require_file(self.vocoder, VOCODER, "it turns spectrograms into sound"), "vocoder")

    def audio_settings(self) -> Settings:
        """Return the settings of the sound's VAE, read once; raise OptionError if --audio_vae is missing."""
        settings: Settings = read_once(self.audio_vae_path, _read_audio_settings)
        return settings

    @property
    def audio(self) -> AudioSpec:
        """Return the format of the sound's latents, from the VAE's file or the transformer's."""
        channels, rate, hop = AUDIO_CHANNELS, RATE, HOP
        if self.audio_vae is not None and self.audio_vae.exists():  # other checks report a missing file
            settings = self.audio_settings()
            channels, rate, hop = (
                settings[name] for name in ("latent_channels", "sample_rate", "hop_length")
            )
        elif self.dit is not None:
            channels = self.dit_header().config.audio_channels
        return AudioSpec(
            rate,
            channels=1,
            shape=partial(audio_shape, channels, rate, hop),
            modules=("audio", "va_cross_attention", "av_cross_attention", "va_modulation", "av_modulation"),
            silent_option="",
        )

    @property
    def audio_scale(self) -> str:
        """Return the scale of the sound's latents, as caches and metadata name it."""
        return f"{self.audio_settings()['scaling_factor']:g}"

    def audio_identity(self) -> dict[str, str]:
        """Return what the sound's latents depend on: the weights of the VAE, and the scale next to them."""
        return {"audio_vae": fingerprint(self.audio_vae_path), AUDIO_SCALE: self.audio_scale}

    def load_audio(self, device: torch.device, decodes: bool) -> AudioNetworks:
        """Load the sound's VAE, and for decoding also the vocoder."""
        vae = load_audio_vae(self.audio_vae_path, device)
        rate = self.audio_settings()["sample_rate"]
        return vae, load_vocoder(self.vocoder_path, device, rate) if decodes else None

    def check_audio(self) -> None:
        """Raise an error if files of the sound do not fit the task, the transformer or each other."""
        if not self.task.has_audio:
            given = AUDIO_VAE if self.audio_vae is not None else VOCODER
            if self.audio_vae is not None or self.vocoder is not None:
                raise OptionError(
                    f"{given}: --task {self.task.name} makes no sound. Omit it, or use Kandinsky 6 (--task "
                    "k6-lite-5s)"
                )
            return
        if self.audio_vae is None:
            return
        settings = self.audio_settings()
        if self.vocoder is not None:
            vocoder = read_once(self.vocoder_path, _read_vocoder_settings)
            taken = (vocoder["num_mels"], math.prod(vocoder["upsample_rates"]))
            made = (settings["mel_bins"], settings["hop_length"])
            if taken != made:
                raise OptionError(
                    f"{VOCODER}: {self.vocoder_path} takes spectrograms of {taken[0]} bins, a frame for "
                    f"{taken[1]} samples, but those of {self.audio_vae_path} have {made[0]} bins and a frame "
                    f"for {made[1]}. Pass both of one release"
                )
        if self.dit is not None:
            channels = self.dit_header().config.audio_channels
            if channels != settings["latent_channels"]:
                raise OptionError(
                    f"{AUDIO_VAE}: the latents of {self.audio_vae_path} have {settings['latent_channels']} "
                    f"channels, but {self.dit_path} takes {channels}. Pass both of one release"
                )

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


def _read_audio_settings(checkpoint: Checkpoint) -> Settings:
    return read_audio_vae(checkpoint).config


def _read_vocoder_settings(checkpoint: Checkpoint) -> Settings:
    return read_vocoder(checkpoint).config


def _read_text_width(checkpoint: Checkpoint) -> int:
    return read_language_model(checkpoint, CLIP_SETTINGS.model, CLIP_SETTINGS.states).config.dim


def select_task(
    name: str | None, dit: Path | None, vae: Path | None = None, audio_vae: Path | None = None
) -> KandinskyTask:
    """Return the task that --task names, or the one that the files suggest.

    Args:
        name: Value of --task; None if it is not given.
        dit: Value of --dit; None if it is not given.
        vae: Value of --vae, which tells clips from images if there is no transformer.
        audio_vae: Value of --audio_vae, which tells clips with sound if there is no transformer.
    """
    if name is not None:
        task = TASKS[name]
        if dit is not None:
            _warn_of_other_kind(task, dit)
        return task
    if dit is not None and not dit.exists():  # other checks report it
        name = dit.name.lower()
        kind = T2I if T2I in name else TI2VA if "kandinsky-6" in name or "kandinsky6" in name else "video"
        return guess_task(dit.name, DIM_BY_SIZE[PRO if PRO in name else LITE], kind)
    if dit is not None:
        files = KandinskyFiles(dit=dit)
        config, path = files.dit_header().config, files.dit_path
        task = guess_task(_name_with_folders(path), config.dim, config.kind)
        logger.info("--task is %s: the size and the name of %s say so", task.name, path)
        return task
    if audio_vae is not None:
        return AUDIO_TASKS[LITE]  # what is cached does not depend on the size
    if vae is not None and _is_image_vae(KandinskyFiles(vae=vae)):
        return TASKS["k5-lite-t2i-hd"]
    return DEFAULT_TASK


def _warn_of_other_kind(task: KandinskyTask, dit: Path) -> None:
    """Warn if a file is named as one that starts from an image, or from text, and the task says otherwise."""
    name = dit.name.lower()
    for kind, starts in ((T2V, "text"), (I2V, "an image")):
        if kind in name and kind != task.kind and task.kind in (T2V, I2V):
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
