"""Files of a FLUX.1 or Chroma run: their paths, and the check that each fits its option."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from encoders.autoencoder import (
    Autoencoder,
    autoencoder_identity,
    load_autoencoder,
    read_autoencoder_header,
)
from encoders.clip_checkpoints import read_clip_text
from encoders.clip_l import CLIP_L, ClipTextEncoder
from encoders.t5 import T5_FILES, T5_XXL, T5TextEncoder
from encoders.t5_network import read_t5
from flux.checkpoints import NAMES, OPTION, read_dit_header
from flux.configs import CHROMA, DEV, FluxConfig
from flux.options import FluxTextOptions
from modules.checkpoints.dits import DitHeader
from modules.checkpoints.encoders import check_state_width, dtype_beside
from modules.checkpoints.model_files import read_once, require_file
from modules.checkpoints.opening import Checkpoint
from modules.contract.family import TextEncoder
from modules.devices import choose_compute_dtype
from modules.errors import OptionError
from modules.speed_options import VaeOptions

logger = logging.getLogger(__name__)

AE, CLIP, T5 = "ae", "clip_l", "t5xxl"  # names in `check`


@dataclass(frozen=True)
class FluxEncoderPaths:
    """Paths and dtypes as the options give them.

    The path properties raise OptionError or CheckpointError, naming the option. The default dtype is
    bfloat16, or float32 if the transformer is float32.
    """

    vae: Path | None = None
    clip_l: Path | None = None
    t5xxl: Path | None = None
    clip_l_tokenizer: Path | None = None
    t5xxl_tokenizer: Path | None = None
    vae_dtype: torch.dtype | None = None
    vae_tile: int | None = None
    text_dtype: torch.dtype | None = None
    t5_in_fp8: bool = False
    t5_tokens: int | None = None  # None: as the transformer was trained

    @property
    def vae_path(self) -> Path:
        return require_file(self.vae, "--ae", "it turns pixels into latents and back")

    @property
    def clip_l_path(self) -> Path:
        return require_file(self.clip_l, "--clip_l", "CLIP-L encodes the prompts")

    @property
    def t5xxl_path(self) -> Path:
        return require_file(self.t5xxl, "--t5xxl", "T5 encodes the prompts")

    def add_vae(self, options: VaeOptions) -> "FluxEncoderPaths":
        """Return a copy with the options of the autoencoder."""
        dtype = choose_compute_dtype(options.vae_dtype, "--vae_dtype", None)
        return replace(self, vae=options.vae, vae_dtype=dtype, vae_tile=options.tile)

    def add_text(self, options: FluxTextOptions) -> "FluxEncoderPaths":
        """Return a copy with the options of the text encoders."""
        return replace(
            self,
            clip_l=options.clip_l,
            t5xxl=options.t5xxl,
            clip_l_tokenizer=options.clip_l_tokenizer,
            t5xxl_tokenizer=options.t5xxl_tokenizer,
            text_dtype=choose_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            t5_in_fp8=options.fp8_t5,
            t5_tokens=options.t5xxl_max_token_length,
        )

    def text_encoders(
        self, dit_dtype: torch.dtype | None, has_pooled: bool, tokens: int, uses_mask: bool
    ) -> list[TextEncoder]:
        """Return the encoders; their files are opened when they are loaded.

        dit_dtype: compute dtype of the transformer, or None. has_pooled: CLIP-L is one of them. tokens: that
        T5 reads if no option says it. uses_mask: T5 does not attend to padding.
        """
        dtype = beside(self.text_dtype, dit_dtype)
        clip = [ClipTextEncoder(self.clip_l_path, dtype, self.clip_l_tokenizer)] if has_pooled else []
        t5 = T5TextEncoder(
            self.t5xxl_path,
            dtype,
            self.t5xxl_tokenizer,
            max_length=self.t5_tokens or tokens,
            uses_mask=uses_mask,
            in_fp8=self.t5_in_fp8,
        )
        return [*clip, t5]

    def load_vae(self, device: torch.device, dit_dtype: torch.dtype | None) -> Autoencoder:
        """Load the autoencoder. dit_dtype: compute dtype of the transformer, or None."""
        return load_autoencoder(self.vae_path, device, beside(self.vae_dtype, dit_dtype), self.vae_tile)

    def vae_identity(self, dit_dtype: torch.dtype | None) -> Mapping[str, str]:
        """Return the facts that latents depend on besides the pixels."""
        return autoencoder_identity(self.vae_path, beside(self.vae_dtype, dit_dtype), self.vae_tile)

    def check(
        self,
        needed: Collection[str] = (),
        dit_path: Path | None = None,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
    ) -> None:
        """Check the files that are given or needed (AE, CLIP, T5). Loads nothing.

        Raises OptionError if a needed one is not given, CheckpointError if a file is missing, or another kind
        or size of network than the transformer takes. text_dim, pooled_dim: that it takes; None: any.
        """
        if self.vae is not None or AE in needed:
            read_autoencoder_header(self.vae_path)
        if self.clip_l is not None or CLIP in needed:
            path = ClipTextEncoder(self.clip_l_path).path
            check_state_width(
                f"--{CLIP}", path, read_once(path, _clip_width), dit_path, pooled_dim, CLIP_L.release
            )
        if self.t5xxl is not None or T5 in needed:
            path = T5TextEncoder(self.t5xxl_path).path
            check_state_width(f"--{T5}", path, read_once(path, _t5_width), dit_path, text_dim, T5_XXL.release)
        if self.clip_l_tokenizer is not None:
            CLIP_L.tokenizer.check_given(self.clip_l_tokenizer)
        if self.t5xxl_tokenizer is not None:
            T5_FILES.check_given(self.t5xxl_tokenizer)


def beside(chosen: torch.dtype | None, dit_dtype: torch.dtype | None) -> torch.dtype:
    """Return an encoder's dtype: `chosen`, else bfloat16, or float32 if the transformer is."""
    return dtype_beside(chosen, dit_dtype, torch.bfloat16)


def _clip_width(checkpoint: Checkpoint) -> int:
    return read_clip_text(checkpoint, CLIP_L).config.dim


def _t5_width(checkpoint: Checkpoint) -> int:
    return read_t5(checkpoint, T5_XXL).config.dim


@dataclass(frozen=True)
class FluxFiles:
    """Paths as the options give them.

    `dit_path` returns an existing path, or raises OptionError or CheckpointError naming the option.
    """

    dit: Path | None = None
    encoders: FluxEncoderPaths = FluxEncoderPaths()
    says_chroma: bool = False  # --model_type chroma

    @property
    def dit_path(self) -> Path:
        return require_file(self.dit, OPTION, "the transformer checkpoint")

    def dit_header(self) -> DitHeader[FluxConfig]:
        """Read dimensions, dialect and dtype of the transformer file.

        Raises OptionError if it does not fit --model_type.
        """
        header = read_once(self.dit_path, read_dit_header)
        if self.says_chroma and header.kind != CHROMA:
            raise OptionError(
                f"--model_type chroma: {self.dit_path} is {NAMES[header.kind]}. Leave the option out, "
                "or give a Chroma checkpoint"
            )
        return header

    @property
    def kind(self) -> str:
        """DEV, SCHNELL or CHROMA; without a transformer that of --model_type."""
        if self.dit is None:
            return CHROMA if self.says_chroma else DEV
        return self.dit_header().kind

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Names of the text encoders that the model has, for `FluxEncoderPaths.check`."""
        return (T5,) if self.kind == CHROMA else (CLIP, T5)

    def check_encoders(self, *needed: str) -> None:
        """Check the files of encoders that are given or needed: `FluxEncoderPaths.check`."""
        config = self.dit_header().config
        self.encoders.check(needed, self.dit_path, config.text_dim, config.pooled_dim or None)
