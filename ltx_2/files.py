"""Files of an LTX-2 run: the released file or separate files of its parts, each checked."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch

from checkpoints.dits import with_dtype
from checkpoints.encoders import check_state_width
from checkpoints.model_files import inside, read_once, require_file
from checkpoints.opening import Checkpoint, fingerprint
from encoders.files import TransformerFiles
from ltx_2 import gemma_4
from ltx_2.audio import (
    MEL_DOWNSAMPLING,
    RATE,
    AudioVae,
    Settings,
    Vocoder,
    latent_count,
    load_audio_vae,
    load_vocoder,
    read_audio_vae,
)
from ltx_2.checkpoints import AUDIO_ALONE, FORMAT, SILENT
from ltx_2.checkpoints import identify as identify  # files.py has it in every family's folder
from ltx_2.configs import LATENT, LtxConfig
from ltx_2.connectors import FILES, open_connectors, read_connectors
from ltx_2.model import LtxModel
from ltx_2.model_options import AUDIO, CHECKPOINT, GEMMA, VIDEO, Ltx2TextOptions, Ltx2VaeOptions
from ltx_2.options import Ltx2SigmaOptions, Ltx2TrainingOptions, Ltx2TransformerOptions
from ltx_2.text_encoder import GEMMA_USE, Ltx2TextEncoder, prompt_key
from ltx_2.vae_checkpoints import read_video_vae
from ltx_2.video_vae import LtxVideoVae, load_video_vae
from ltx_2.video_vae_blocks import VideoVaeConfig
from modules.devices import select_compute_dtype
from modules.errors import CacheError, OptionError
from modules.speed_options import text_form
from protocols.data import AUDIO_LATENTS, LATENTS_PART, AudioSpec, Batch, LatentSpec
from protocols.family import TextEncoder
from protocols.loading import Placement
from protocols.rules import ShiftedLogit

logger = logging.getLogger(__name__)

TEXTS_AGAIN = "ltx2_cache_text_encoder_outputs.py"
NO_IMAGES = {"vae": "sound alone"}  # recorded for placeholder latents of video
RELEASED, AUDIO_VAE = "--ltx2_checkpoint", "--audio_vae"
# parts that LTX-2.5 stores in separate files
APART = {
    "vae": "ltx-2.5-video-vae-conv-bf16.safetensors",
    **dict.fromkeys(("audio_vae", "vocoder"), "ltx-2.5-audio-vae-bf16.safetensors"),
}
# released dimensions of audio, used if its file is missing
AUDIO_SETTINGS: Settings = {"latent_channels": 8, "mel_bins": 64, "in_channels": 2}


@dataclass(frozen=True)
class Ltx2Files(TransformerFiles):
    """Model files of a run; a part without an option is read from the released file or folder."""

    checkpoint: Path | None = None
    audio_vae: Path | None = None
    gemma: Path | None = None
    tokenizer: Path | None = None
    connectors: Path | None = None
    text_form: str | None = None
    text_on_cpu: bool = False
    streams: tuple[str, ...] = (VIDEO,)

    format: ClassVar = FORMAT

    def add_vaes(self, options: Ltx2VaeOptions) -> Self:
        """Return a copy of these files with the VAEs' options added."""
        return replace(self.add_vae(options.file), audio_vae=options.audio_vae)

    def add_text(self, options: Ltx2TextOptions, dtype: str | None = None) -> Self:
        """Return these files with Gemma's options added; `dtype`, a name, replaces --text_encoder_dtype."""
        return replace(
            self,
            gemma=options.gemma,
            tokenizer=options.tokenizer,
            connectors=options.ltx2_text_encoder_checkpoint,
            text_dtype=select_compute_dtype(
                dtype or options.text_encoder_dtype, "--text_encoder_dtype", None
            ),
            text_form=text_form(options),
            text_on_cpu=options.text_encoder_cpu,
        )

    @property
    def has_audio(self) -> bool:
        """Return whether the run has audio."""
        return AUDIO in self.streams

    @property
    def has_images(self) -> bool:
        """Return whether the run has video."""
        return VIDEO in self.streams

    def _find_part(self, part: Path | None, option: str, folder: str, what: str) -> Path:
        """Return the file of a model part, from its option or else from the release."""
        release = require_file(part or self.checkpoint, option if part else RELEASED, what, CHECKPOINT)
        path = inside(release, folder)
        if part is None and folder in APART and read_once(path, _lacks, f"{folder}."):
            raise OptionError(
                f"{RELEASED} {path} has a transformer, but not this part, which LTX-2.5 has in a separate "
                f"file. Pass {APART[folder]} to {option}: {what}"
            )
        return path

    # the transformer

    @property
    def dit_path(self) -> Path:
        """Return the transformer's path, or for a release folder its subfolder `transformer`."""
        return inside(super().dit_path, "transformer")

    def load_dit(self, placement: Placement) -> LtxModel:
        """Load the transformer; for a single stream, omit the other stream's layers."""
        dit_format = FORMAT
        if not self.has_images:
            dit_format = AUDIO_ALONE
        elif not self.has_audio:
            dit_format = SILENT
        network: LtxModel = dit_format.load(self.dit_path, with_dtype(placement, self.dit_dtype))
        return network

    # the autoencoders

    @property
    def vae_path(self) -> Path:
        """Return the video VAE's path: its option, else the released file or folder."""
        return self._find_part(self.vae, "--vae", "vae", "it turns pixels into latents and back")

    @property
    def latent(self) -> LatentSpec:
        """Return the video VAE's latent space.

        Without the VAE's file, it is the released one with the transformer's channels; for audio alone, a
        placeholder.
        """
        if not self.has_images:
            return LATENT
        try:
            config: VideoVaeConfig = read_once(self.vae_path, _read_video_vae)
        except (OptionError, OSError):
            return LATENT if self.dit is None else replace(LATENT, channels=self._count_channels())
        frames, height, _ = config.stride
        return replace(
            LATENT,
            channels=config.latent_channels,
            stride=config.stride,
            pixel_step=height,
            frame_step=frames,
        )

    def _count_channels(self) -> int:
        channels: int = self.dit_header().config.video.channels
        return channels

    def load_vae(self, device: torch.device) -> LtxVideoVae:
        """Load the VAE in the dtype and tile size that the options set."""
        return load_video_vae(self.vae_path, device, self.encoder_dtype(self.vae_dtype), self.vae_tile)

    def vae_identity(self) -> Mapping[str, str]:
        """Return what cached video latents depend on; a constant without video."""
        return super().vae_identity() if self.has_images else NO_IMAGES

    def check_vae(self) -> None:
        """Raise CheckpointError if a VAE that the run uses belongs to another model."""
        if self.has_images:
            read_once(self.vae_path, _read_video_vae)
        if self.has_audio:
            read_once(self.audio_path("audio_vae"), _read_audio_vae)

    def audio_path(self, part: str) -> Path:
        """Return the path of the audio VAE or the vocoder, as `part` names it."""
        return self._find_part(self.audio_vae, AUDIO_VAE, part, "it turns audio into latents and back")

    @property
    def audio(self) -> AudioSpec | None:
        """Return the latent space of audio; None if the run has no audio."""
        if not self.has_audio:
            return None
        try:
            settings: Settings = read_once(self.audio_path("audio_vae"), _read_audio_vae)
        except OptionError:  # a training run from caches needs no VAE
            settings = AUDIO_SETTINGS
            # Raise OptionError if the transformer takes other audio latents than the released VAEs produce
            stream = None if self.dit is None else self.dit_header().config.audio
            default = AUDIO_SETTINGS["latent_channels"] * AUDIO_SETTINGS["mel_bins"] // MEL_DOWNSAMPLING
            if stream is not None and stream.channels != default:
                raise OptionError(
                    f"{AUDIO_VAE}: {self.dit_path} takes audio of {stream.channels} channels, but that of "
                    f"the releases has {default}. Pass the file of its audio VAE"
                ) from None
        return AudioSpec(
            RATE,
            settings["in_channels"],
            partial(audio_shape, settings["latent_channels"], settings["mel_bins"] // MEL_DOWNSAMPLING),
            silent_option="--ltx2_mode video",
            audio_only=not self.has_images,
        )

    def audio_identity(self) -> dict[str, str]:
        """Return the checksum of the audio VAE, by name. Its dtype is ignored: it is always float32."""
        return {"audio_vae": fingerprint(self.audio_path("audio_vae"))}

    def load_audio(self, device: torch.device, decodes: bool) -> tuple[AudioVae, Vocoder | None]:
        """Load the audio VAE, and for decoding also the vocoder."""
        option = AUDIO_VAE if self.audio_vae else RELEASED
        vocoder = load_vocoder(self.audio_path("vocoder"), device, option) if decodes else None
        return load_audio_vae(self.audio_path("audio_vae"), device, option), vocoder

    # texts

    def text_encoder(self) -> Ltx2TextEncoder:
        """Return the text encoder, Gemma with the connectors to the transformer; weights are read later.

        Raises OptionError if options name the Gemma of another LTX version.
        """
        gemma_path, connectors_path = self._find_text_files()
        connectors = self._find_part(connectors_path, gemma_4.OPTION, "connectors", "it joins texts")
        gemma_4.check_version(connectors, gemma_path)
        return Ltx2TextEncoder(
            gemma_path,
            connectors,
            dtype=self.encoder_dtype(self.text_dtype),
            tokenizer=self.tokenizer,
            form=self.text_form,
            on_cpu=self.text_on_cpu,
            streams=self.streams,
            use=gemma_4.GEMMA_4_USE if read_once(gemma_path, gemma_4.is_gemma_4) else GEMMA_USE,
        )

    def _find_text_files(self) -> tuple[Path, Path | None]:
        """Return the path of Gemma and, if an option names it, the path of the connectors (else None)."""
        # --ltx2_text_encoder_checkpoint (`self.connectors`) names either the connectors, which need Gemma 3
        # from another option, or LTX-2.5's text encoder, Gemma 4 in a single file.
        path = self.connectors
        if path is None or not read_once(require_file(path, gemma_4.OPTION, ""), gemma_4.is_gemma_4):
            # The path of --gemma_root; raise OptionError if the transformer needs Gemma 4 instead
            # without Gemma's file, the file next to it shows which Gemma it needs
            neighbor = self.connectors or self.checkpoint
            is_missing = self.gemma is not None and not self.gemma.exists()
            if is_missing and neighbor and neighbor.is_file() and read_once(neighbor, gemma_4.wanted_gemma):
                raise OptionError(
                    f"{neighbor} is of LTX-2.5, whose texts Gemma 4 encodes. Pass {gemma_4.FILE} to "
                    f"{gemma_4.OPTION}"
                )
            folder = require_file(self.gemma, "--gemma_root", "Gemma 3 encodes the prompts", GEMMA)
            return inside(folder, "text_encoder"), path
        if self.gemma not in (None, GEMMA):
            raise OptionError(
                f"--gemma_root {self.gemma}: the text encoder of LTX-2.5 is in {path}. Omit "
                "--gemma_root or --gemma_safetensors"
            )
        return path, None

    def text_encoders(self) -> list[TextEncoder]:
        """Return the text encoders, whose weights are read when they are loaded."""
        return [self.text_encoder()]

    def check_texts(self, config: LtxConfig | None, needed: bool) -> None:
        """Raise an error if Gemma, the connectors and the transformer do not fit each other.

        Unless `needed`, nothing is checked, because the default paths often do not exist.
        """
        if not needed:
            return
        encoder = self.text_encoder()
        encoder.check()
        # LTX-2.5 encodes texts with Gemma 4, earlier versions with Gemma 3
        is_gemma_3 = encoder.settings is GEMMA_USE
        if config is not None and is_gemma_3 == (config.kind == "2.5"):
            raise OptionError(
                f"{encoder.path} is {encoder.settings.model.description}, {self.dit_path} is of "
                f"LTX-{config.kind}, which needs a different one. Pass the text encoder of its release"
            )
        with open_connectors(encoder.connectors, encoder.path) as checkpoint:
            connectors = read_connectors(checkpoint, self.streams).config.streams
        text_dims = {} if config is None else _text_dims(config)
        for stream, text_dim in text_dims.items():
            if stream in self.streams:
                width = connectors[stream].dim
                check_state_width(RELEASED, encoder.connectors, width, self.dit, text_dim, FILES)

    def check_cached_texts(self, batch: Batch) -> tuple[str, ...]:
        """Check a batch's cached texts, and return the cache keys that the transformer needs.

        Raises CacheError if texts or audio are missing, or if texts are from another release.
        """
        config = self.dit_header().config
        text_dims = _text_dims(config)
        needed = {prompt_key(stream): text_dims[stream] for stream in self.streams}
        self._check_cached_streams(batch)
        batch.check(dict.fromkeys(needed, TEXTS_AGAIN), "the transformer")
        batch.check_widths(needed, self.dit_path, f"{TEXTS_AGAIN} and its release")
        for cache in batch.cache_origins:  # caches of other tools have no records
            is_gemma_4 = "gemma4" in cache.encoder
            if cache.part == GEMMA_USE.name and is_gemma_4 != (config.kind == "2.5"):
                release = "LTX-2.5 (Gemma 4)" if is_gemma_4 else "LTX-2.3 or 2.0 (Gemma 3)"
                raise CacheError(
                    f"{cache.path}: the caption was encoded for {release}, {self.dit_path} is of "
                    f"LTX-{config.kind}. Cache again with {TEXTS_AGAIN} and its release."
                )
        return tuple(needed)

    def _check_cached_streams(self, batch: Batch) -> None:
        """Raise CacheError if a batch lacks a stream, video or audio, that the run trains."""
        if not self.has_images and AUDIO_LATENTS not in batch.tensors:
            raise CacheError(
                f"{batch.keys[0]}: it has no audio, but --ltx2_mode audio learns nothing else. Remove "
                "this clip from the dataset"
            )
        for cache in batch.cache_origins if self.has_images else ():
            if cache.part == LATENTS_PART and cache.encoder == NO_IMAGES:
                raise CacheError(
                    f"{cache.path}: it was cached with --ltx2_mode audio and has no images. Cache again "
                    "without it, or train with --ltx2_mode audio"
                )


def _text_dims(config: LtxConfig) -> dict[str, int]:
    """Return the width of the text states that the transformer takes, for each stream by name."""
    text_dims = [stream.text_dim for stream in config.streams.values()]
    return dict(zip((VIDEO, AUDIO), text_dims, strict=False))


def _read_video_vae(checkpoint: Checkpoint) -> VideoVaeConfig:
    return read_video_vae(checkpoint).config


def _read_audio_vae(checkpoint: Checkpoint) -> Settings:
    return read_audio_vae(checkpoint, AUDIO_VAE).config


def _lacks(checkpoint: Checkpoint, part: str) -> bool:
    """Return whether a file has a transformer but no tensors that begin with `part`."""
    names = checkpoint.tensors
    has_dit = any(name.endswith("audio_patchify_proj.weight") for name in names)
    return has_dit and not any(name.startswith(part) for name in names)


def audio_shape(channels: int, bins: int, frames: int, fps: float) -> tuple[int, int, int]:
    """Return the shape C T M of a clip's audio latents: channels, latents in time, mel bins."""
    return channels, latent_count(frames, fps), bins


def make_model_files(options: Ltx2TransformerOptions, streams: tuple[str, ...]) -> Ltx2Files:
    """Return the model files of a training run or generation that trains or generates `streams`."""
    files = Ltx2Files(
        checkpoint=options.model.ltx2_checkpoint,
        streams=streams,
        dit_option="--dit" if options.dit else RELEASED,
    )
    return files.add_dit(options.dit_file, options.dit_dtype).add_vaes(options.vae).add_text(options.text)


def check_version(files: Ltx2Files, options: Ltx2TrainingOptions) -> None:
    """Compare --ltx_version with the version that the transformer's file shows.

    If they differ, --ltx_version_check_mode decides: warn, raise OptionError, or ignore it.
    """
    version = files.dit_header().config.kind
    typed = options.ltx_version or version
    message = f"--ltx_version {typed}: {files.dit_path} is of version {version}. Pass --ltx_version {version}"
    if version != typed and options.ltx_version_check_mode == "error":
        raise OptionError(f"{message}, or --ltx_version_check_mode warn")
    if version != typed and options.ltx_version_check_mode == "warn":
        logger.warning("%s", message)


def shifted_logit(options: Ltx2SigmaOptions, files: Ltx2Files) -> ShiftedLogit:
    """Return the shifted_logit_normal sampler, with the release's values where options are unset."""
    fixed, mode = options.shifted_logit_shift, options.shifted_logit_mode
    bounds = (options.shifted_logit_min_shift, options.shifted_logit_max_shift)
    if mode is None:
        mode = "legacy" if files.dit_header().config.kind == "2.0" else "stretched"
    return ShiftedLogit(
        mus=bounds if fixed is None else (fixed, fixed),
        is_clamped=options.shifted_logit_clamp_auto_shift,
        is_stretched=mode == "stretched",
        minimum=options.shifted_logit_eps,
        uniform_share=options.shifted_logit_uniform_prob,
    )
