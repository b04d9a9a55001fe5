"""Files of a HunyuanVideo run: their paths, and the check that each fits its option."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from encoders.clip_checkpoints import read_clip_text
from hunyuan_model.checkpoints import read_dit_header
from hunyuan_model.configs import HunyuanVideoConfig
from hunyuan_model.options import HunyuanTextOptions, HunyuanVaeOptions
from hunyuan_model.text_checkpoints import LLAMA_FILES, read_llama
from hunyuan_model.text_encoders import CLIP, LlavaTextEncoder, clip_text_encoder
from hunyuan_model.tokenizer import LLAMA_FILES as LLAMA_TOKENIZER
from hunyuan_model.vae import TILE_FRAMES, HunyuanVae, load_vae
from hunyuan_model.vae_checkpoints import read_vae
from modules.checkpoints.dits import DitHeader
from modules.checkpoints.encoders import check_state_width, dtype_beside
from modules.checkpoints.model_files import inside, read_once, require_file
from modules.checkpoints.opening import Checkpoint, fingerprint
from modules.devices import choose_compute_dtype, dtype_name


@dataclass(frozen=True)
class HunyuanEncoderPaths:
    """Paths and dtypes as the options give them.

    The path properties raise OptionError or CheckpointError, naming the option. The default dtype is float16
    as released, or float32 if the transformer is float32.
    """

    vae: Path | None = None
    text_encoder1: Path | None = None
    text_encoder2: Path | None = None
    text_encoder1_tokenizer: Path | None = None
    text_encoder2_tokenizer: Path | None = None
    vae_dtype: torch.dtype | None = None
    vae_tile: int | None = None
    vae_tile_frames: int = TILE_FRAMES
    vae_chunk_size: int | None = None
    text_dtype: torch.dtype | None = None
    llm_in_fp8: bool = False

    @property
    def vae_path(self) -> Path:
        return inside(require_file(self.vae, "--vae", "it turns pixels into latents and back"), "vae")

    @property
    def text_encoder1_path(self) -> Path:
        return require_file(
            self.text_encoder1, "--text_encoder1", "LLaVA's language model encodes the prompts"
        )

    @property
    def text_encoder2_path(self) -> Path:
        return require_file(self.text_encoder2, "--text_encoder2", "CLIP-L encodes the prompts too")

    def add_vae(self, options: HunyuanVaeOptions) -> "HunyuanEncoderPaths":
        """Return a copy with the options of the VAE."""
        return replace(
            self,
            vae=options.file.vae,
            vae_dtype=choose_compute_dtype(options.file.vae_dtype, "--vae_dtype", None),
            vae_tile=options.file.tile,
            vae_chunk_size=options.vae_chunk_size,
        )

    def add_text(self, options: HunyuanTextOptions) -> "HunyuanEncoderPaths":
        """Return a copy with the options of the text encoders."""
        return replace(
            self,
            text_encoder1=options.text_encoder1,
            text_encoder2=options.text_encoder2,
            text_encoder1_tokenizer=options.text_encoder1_tokenizer,
            text_encoder2_tokenizer=options.text_encoder2_tokenizer,
            text_dtype=choose_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            llm_in_fp8=options.fp8_llm,
        )

    def load_vae(self, device: torch.device, dit_dtype: torch.dtype | None) -> HunyuanVae:
        """Load the VAE. dit_dtype: compute dtype of the transformer, or None. Raises as `load_vae`."""
        dtype = beside(self.vae_dtype, dit_dtype)
        return load_vae(
            self.vae_path, device, dtype, self.vae_chunk_size, self.vae_tile, tile_frames=self.vae_tile_frames
        )

    def vae_identity(self, dit_dtype: torch.dtype | None) -> Mapping[str, str]:
        """Return the facts that latents depend on besides the pixels."""
        dtype = dtype_name(beside(self.vae_dtype, dit_dtype))
        return {"vae": fingerprint(self.vae_path), "vae_dtype": dtype, "tile": str(self.vae_tile)}

    def check(
        self,
        needed: Collection[str] = (),
        dit_path: Path | None = None,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
    ) -> None:
        """Check the files that are given or needed ("vae", "text_encoder1", "text_encoder2"). Loads nothing.

        Raises OptionError if a needed one is not given, CheckpointError if a file is missing, or another kind
        or size of network than the transformer takes. text_dim, pooled_dim: that it takes; None: any.
        """
        if self.vae is not None or "vae" in needed:
            read_once(self.vae_path, read_vae)
        if self.text_encoder1 is not None or "text_encoder1" in needed:
            path = LlavaTextEncoder(self.text_encoder1_path).path
            check_state_width(
                "--text_encoder1", path, read_once(path, _llama_width), dit_path, text_dim, LLAMA_FILES
            )
        if self.text_encoder2 is not None or "text_encoder2" in needed:
            path = clip_text_encoder(self.text_encoder2_path).path
            check_state_width(
                "--text_encoder2", path, read_once(path, _clip_width), dit_path, pooled_dim, CLIP.release
            )
        if self.text_encoder1_tokenizer is not None:
            LLAMA_TOKENIZER.check_given(self.text_encoder1_tokenizer)
        if self.text_encoder2_tokenizer is not None:
            CLIP.tokenizer.check_given(self.text_encoder2_tokenizer)


def beside(chosen: torch.dtype | None, dit_dtype: torch.dtype | None) -> torch.dtype:
    """Return an encoder's dtype: `chosen`, else float16 as released, or float32 if the transformer is."""
    return dtype_beside(chosen, dit_dtype, torch.float16)


def _llama_width(checkpoint: Checkpoint) -> int:
    # the width does not depend on the chosen state
    return read_llama(checkpoint, skip_layers=0, final_norm=False).config.dim


def _clip_width(checkpoint: Checkpoint) -> int:
    return read_clip_text(checkpoint, CLIP).config.dim


@dataclass(frozen=True)
class HunyuanFiles:
    """Paths as the options give them.

    `dit_path` returns an existing path, or raises OptionError or CheckpointError naming the option.
    """

    dit: Path | None = None
    encoders: HunyuanEncoderPaths = HunyuanEncoderPaths()

    @property
    def dit_path(self) -> Path:
        return require_file(self.dit, "--dit", "the transformer checkpoint")

    def dit_header(self) -> DitHeader[HunyuanVideoConfig]:
        """Read dimensions, dialect and dtype of the transformer file."""
        return read_once(self.dit_path, read_dit_header)

    def check_encoders(self, *needed: str) -> None:
        """Check the files of encoders that are given or needed, against the transformer if there is one."""
        if self.dit is None:
            return self.encoders.check(needed)
        config = self.dit_header().config
        return self.encoders.check(needed, self.dit_path, config.text_dim, config.pooled_dim)
