"""Files of a MiniMax-H3 run: transformer, VAEs of video and audio, Qwen3-VL with its own tokenizer."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from checkpoints.dits import DitFormat
from checkpoints.model_files import inside, read_once, require_file
from checkpoints.opening import Checkpoint, fingerprint
from checkpoints.tokenizers import TokenizerFiles
from encoders.language_encoder import (
    LanguageEncoderSettings,
    LanguageModelEncoder,
    LanguageModelFiles,
    read_qwen_tokenizer,
)
from encoders.language_models import QWEN3_VL
from encoders.text_encoder import TextTokenizer, TokenizerSource, check_ids, compute_token_weights
from minimax_h3.audio import (
    CHANNELS,
    RATE,
    H3AudioVae,
    Settings,
    latent_count,
    load_audio_vae,
    read_audio_vae,
)
from minimax_h3.cache_marks import KEY, TAGS
from minimax_h3.configs import LATENT
from minimax_h3.dit_checkpoints import FORMAT as FORMAT  # files.py has both in every family's folder
from minimax_h3.dit_checkpoints import find_task, make_format
from minimax_h3.dit_checkpoints import identify as identify
from minimax_h3.options import FPS, H3ModelOptions, H3TextOptions, H3VaeOptions
from minimax_h3.presentation import (
    IMAGE_PAD,
    IMAGE_PROMPT,
    IMAGE_TAG,
    PLACEHOLDERS,
    TEXT_TAG,
    VISION_END,
    VISION_START,
    PromptPiece,
    present_media,
)
from minimax_h3.released import AUDIO_MEAN
from minimax_h3.vae_checkpoints import read_video_vae
from minimax_h3.video_vae import TILE, H3VideoVae, load_video_vae
from minimax_h3.video_vae_blocks import H3VideoVaeConfig
from minimax_h3.vision import Preprocessing, read_preprocessing
from modules.errors import CheckpointError, MediaError, OptionError
from protocols.data import AudioSpec, Conditions, LatentSpec
from protocols.requests import Prompt

UNDECIDED = ""  # the task is decided by each prompt
LAYERS = 50  # layers of Qwen3-VL up to the state that is used
BLANK = " "  # replaces an empty prompt, which would have no states
MAX_TOKENS = 32768  # maximum length of a prompt, as in musubi-tuner
# tokens that only H3's tokenizer has, among those of Qwen
OWN_TOKENS = (
    "<d>",
    "</d>",
    "<|cutoff|>",
    "<|lyrics_start|>",
    "<|lyrics_end|>",
    "<|caption_start|>",
    "<|caption_end|>",
)
TOKENIZER = TokenizerFiles(
    option="--tokenizer",
    names=("tokenizer.json", "vocab.json"),
    folder="tokenizer",
    repository="MiniMaxAI/MiniMax-H3",
    # inside the encoder's folder; next to text_encoder; next to a single file
    folders=(".", "tokenizer", "../tokenizer", "../processor"),
    unique_token=OWN_TOKENS[0],
)
TEXT_FILES = "qwen3vl_32b_minimax_h3_bf16.safetensors of Comfy-Org, or text_encoder/ of MiniMaxAI/MiniMax-H3,"
H3_USE = LanguageEncoderSettings(
    name="vl",
    states_key=KEY,
    model=replace(QWEN3_VL, files=TEXT_FILES, word_key="qwen3vl_32b"),
    source=TokenizerSource(TOKENIZER, adds_own=False, read_file=read_qwen_tokenizer),
    max_length=MAX_TOKENS,
    states=(LAYERS,),
    mask_key=TAGS,  # 1, the tag of texts, for each token
    empty_prompt_text=BLANK,
    batch_size=1,  # so that a state does not depend on other prompts
    image_format=IMAGE_PROMPT,
)


# folders that may have the preprocessor files, relative to the text encoder's, which is the first
PREPROCESSOR_FOLDERS = (".", "processor", "../processor")


class H3TextEncoder(LanguageModelEncoder):
    """Qwen3-VL with the tokenizer of MiniMax-H3; it also sees the media that accompany a prompt."""

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raise CheckpointError if the tokenizer belongs to another model."""
        missing = [token for token in OWN_TOKENS if tokenizer.token_to_id(token) is None]
        if missing:
            raise CheckpointError(
                f"{tokenizer.file} is not the tokenizer of MiniMax-H3: it has no {' '.join(missing)}. Pass "
                f"the folder tokenizer of {TOKENIZER.repository} to {TOKENIZER.option}.",
                tokenizer.file,
            )

    def preprocessing(self) -> Preprocessing:
        """Return the size limits for images and clips, from files next to the tokenizer or text encoder."""
        folders = []
        tokenizer, _ = self.source.find(self.tokenizer, self.path)
        if tokenizer is not None:
            folders.append(tokenizer.parent)
        folder = self.path if self.path.is_dir() else self.path.parent
        folders += [folder / subfolder for subfolder in PREPROCESSOR_FOLDERS]
        return read_preprocessing(folders)

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return each prompt's states, preceded by the images and clips that are presented with it.

        Raises MediaError if an image or clip cannot be read, or a prompt with its media has too many tokens.
        """
        encoded = []
        for prompt in prompts:
            is_presented = bool(prompt.media_before_text)
            encoded += [self._encode_presented(prompt)] if is_presented else super().encode([prompt])
        return encoded

    def _encode_presented(self, prompt: Prompt) -> Conditions:
        """Return the states of a prompt that follows its images and clips, with a tag for each token."""
        network, tokenizer = self._loaded.get()
        self.load_tower(network.get_parameter(self.embedding).device)
        presentation = present_media(
            prompt.media_before_text, network.get_submodule("visual"), self.preprocessing()
        )
        tokens = tokenizer.read(prompt.text)
        for token in PLACEHOLDERS:
            if tokenizer.token_to_id(token) in tokens.ids:
                raise MediaError(f"{token} stands for an image. Remove it from the prompt: {prompt.text}")
        media_ids, media_tags = self._tokenize_pieces(presentation.pieces, tokenizer)
        ids = [*media_ids, *tokens.ids]
        tags = [*media_tags, *[TEXT_TAG] * len(tokens.ids)]
        # Raise an error if a prompt with its media has too many tokens, or tokens the network lacks
        if len(ids) > self.max_length:
            raise MediaError(
                f"the prompt with its images and clips has {len(ids)} tokens, but at most {self.max_length} "
                "are allowed. Use fewer or smaller references: --reference_image_short_edge, "
                "--reference_video_short_edge"
            )
        num_added_rows = sum(word.word.count for word in self.added_words)
        num_rows = len(network.get_parameter(self.embedding)) + num_added_rows
        check_ids([ids], num_rows, self.path, self.source.files.option)
        (conditions,) = self.compute(
            network, tokenizer, token_ids=[ids], num_template_tokens=0, images=[presentation.images]
        )
        conditions = {**conditions, TAGS: [torch.tensor(tags)]}
        if not prompt.weighted_spans:
            return conditions
        weights = compute_token_weights(self.apply_template(prompt), tokens.char_spans)
        return self.weigh(conditions, [1.0] * len(media_ids) + weights)

    def _tokenize_pieces(
        self, pieces: Sequence[PromptPiece], tokenizer: TextTokenizer
    ) -> tuple[list[int], list[int]]:
        """Return the token ids of the media before a prompt, with a tag (text or image) for each."""
        begin = self.find_token(tokenizer, VISION_START)
        pad = self.find_token(tokenizer, IMAGE_PAD)
        end = self.find_token(tokenizer, VISION_END)
        ids: list[int] = []
        tags: list[int] = []
        for piece in pieces:
            if piece.num_image_tokens:
                block = [begin, *[pad] * piece.num_image_tokens, end]  # placeholders for image tokens
                tag = IMAGE_TAG
            else:
                block = tokenizer.read(piece.text).ids
                tag = TEXT_TAG
            ids += block
            tags += [tag] * len(block)
        return ids, tags


def audio_shape(channels: int, frames: int, fps: float) -> tuple[int, int, int]:
    """Return the shape of a clip's audio latents: channels, 2 (left and right), time.

    `fps` is unused, because the model's clips always have 24 frames per second.
    """
    return channels, CHANNELS, latent_count(frames, FPS)


@dataclass(frozen=True)
class H3Files(LanguageModelFiles):
    """Paths of a run's model files, from its options."""

    audio_vae: Path | None = None
    qkv_layout: str | None = None
    task: str = "t2va"

    encoder_class = H3TextEncoder
    encoder_settings = H3_USE
    vae_option = "--video_vae"
    vae_folder = "vae"

    @property
    def format(self) -> DitFormat[Any, Any]:  # type: ignore[override]
        """Return the format of transformer files, which depends on --h3_qkv_layout."""
        return make_format(self.qkv_layout)

    def add_vaes(self, options: H3VaeOptions) -> Self:
        """Return a copy of these files with the options of both VAEs added."""
        return replace(self.add_vae(options.file), audio_vae=options.audio_vae)

    # the transformer

    @property
    def dit_path(self) -> Path:
        """Return the transformer's path, or for a release folder its subfolder `transformer`."""
        return inside(super().dit_path, "transformer")

    def check_task(self) -> None:
        """Raise OptionError if the transformer's file name contradicts the task."""
        named = None if self.dit is None or self.task == UNDECIDED else find_task(self.dit_path)
        needed_task = "ref2va" if self.task == "ref2va" else "fl2va"
        if named not in (None, needed_task):
            raise OptionError(
                f"--dit {self.dit}: its name says that it is the transformer of {named}, but --task "
                f"{self.task} needs that of {needed_task}. Pass the other file, or rename it if its name is "
                "wrong"
            )

    # the autoencoders

    def load_vae(self, device: torch.device) -> H3VideoVae:
        """Load the VAE in the dtype and tile size that the options set."""
        return load_video_vae(
            self.vae_path, device, self.encoder_dtype(self.vae_dtype), self.vae_tile or TILE
        )

    def vae_identity(self) -> dict[str, str]:
        """Return what cached latents depend on besides pixels and audio; encoding is always in float32."""
        tile = self.vae_tile or TILE
        return {"vae": fingerprint(self.vae_path), "tile": str(tile), **self.audio_identity()}

    def check_vae(self) -> None:
        """Raise CheckpointError if the VAE belongs to another model."""
        read_once(self.vae_path, _read_video_vae)
        read_once(self.audio_vae_path, _read_audio_vae)

    @property
    def latent(self) -> LatentSpec:
        """Return the video VAE's latent space; without its file, the released one."""
        try:
            config: H3VideoVaeConfig = read_once(self.vae_path, _read_video_vae)
        except (OptionError, OSError):
            return LATENT
        space = config.space_stride
        return replace(
            LATENT,
            channels=config.latent_channels,
            stride=(config.time_stride, space, space),
            pixel_step=2 * space,  # a token covers 2 x 2 latents
            frame_step=config.time_stride,
            clip_frames=config.clip_frames,
            tail_frames=config.tail,
        )

    @property
    def audio_vae_path(self) -> Path:
        """Return the audio VAE's path; raise OptionError if --audio_vae is missing."""
        path = require_file(self.audio_vae, "--audio_vae", "it turns audio into latents and back")
        return inside(path, "audio_vae")

    @property
    def audio(self) -> AudioSpec:
        """Return the format of the audio latents, read from the VAE or, without a file, as released."""
        try:
            settings: Settings = read_once(self.audio_vae_path, _read_audio_vae)
            channels: int = settings["latent_channels"]
        except (OptionError, OSError):  # a training run from caches needs no VAE
            channels = len(AUDIO_MEAN)
        return AudioSpec(RATE, CHANNELS, partial(audio_shape, channels), time_axis=2, is_in_latent_cache=True)

    def audio_identity(self) -> dict[str, str]:
        """Return what cached audio depends on besides the samples; the VAE is float32."""
        return {"audio_vae": fingerprint(self.audio_vae_path)}

    def load_audio(self, device: torch.device) -> H3AudioVae:
        """Load the audio VAE."""
        return load_audio_vae(self.audio_vae_path, device)

    # texts

    def add_text(self, options: H3TextOptions) -> Self:  # type: ignore[override]
        """Return a copy with the text encoder's path and settings from `options`."""
        return replace(super().add_text(options), text_form=options.form)

    def check(self, needed: Collection[str] = ()) -> None:
        """Check the task and the named or needed files, without loading weights."""
        self.check_task()
        super().check(needed)


def _read_video_vae(checkpoint: Checkpoint) -> H3VideoVaeConfig:
    return read_video_vae(checkpoint).config


def _read_audio_vae(checkpoint: Checkpoint) -> Settings:
    return read_audio_vae(checkpoint, "--audio_vae").config


def make_model_files(options: H3ModelOptions, task: str = "t2va") -> H3Files:
    """Return the files of a training run or a generation."""
    files = H3Files(qkv_layout=options.h3_qkv_layout, task=task)
    return files.add_dit(options.dit, options.dit_dtype).add_vaes(options.vae).add_text(options.text)
