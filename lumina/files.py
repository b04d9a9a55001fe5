"""Files of a Lumina-Image-2.0 run: their paths, and the check that each fits its option."""

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
from lumina.checkpoints import read_dit_header
from lumina.configs import LuminaConfig
from lumina.gemma import FILES, OPTION, read_gemma
from lumina.options import MAX_TOKENS, LuminaTextOptions
from lumina.text_encoder import GEMMA_FILES, GemmaTextEncoder
from modules.checkpoints.dits import DitHeader
from modules.checkpoints.encoders import check_state_width, dtype_beside
from modules.checkpoints.model_files import read_once, require_file
from modules.checkpoints.opening import Checkpoint
from modules.devices import choose_compute_dtype
from modules.speed_options import VaeOptions

USUAL = torch.bfloat16  # of the encoders; Gemma 2 overflows float16


@dataclass(frozen=True)
class LuminaFiles:
    """Paths and dtypes as the options give them.

    The path properties raise OptionError or CheckpointError, naming the option. The default dtype of encoders
    is bfloat16, or float32 if the transformer is float32.
    """

    dit: Path | None = None
    dit_dtype: torch.dtype | None = None  # None: as the file says
    ae: Path | None = None
    ae_dtype: torch.dtype | None = None
    ae_tile: int | None = None
    gemma2: Path | None = None
    gemma2_tokenizer: Path | None = None
    text_dtype: torch.dtype | None = None
    max_tokens: int = MAX_TOKENS
    system_prompt: str = ""
    system_prompt_in_negative: bool = False

    def add_vae(self, options: VaeOptions) -> "LuminaFiles":
        """Return a copy with the options of the autoencoder."""
        dtype = choose_compute_dtype(options.vae_dtype, "--vae_dtype", None)
        return replace(self, ae=options.vae, ae_dtype=dtype, ae_tile=options.tile)

    def add_text(self, options: LuminaTextOptions) -> "LuminaFiles":
        """Return a copy with the options of the text encoder."""
        return replace(
            self,
            gemma2=options.gemma2,
            gemma2_tokenizer=options.gemma2_tokenizer,
            text_dtype=choose_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            max_tokens=options.gemma2_max_token_length or MAX_TOKENS,
            system_prompt=options.system_prompt.strip(),
        )

    @property
    def dit_path(self) -> Path:
        return require_file(self.dit, "--pretrained_model_name_or_path", "the transformer checkpoint")

    @property
    def ae_path(self) -> Path:
        return require_file(self.ae, "--ae", "it turns pixels into latents and back")

    @property
    def gemma2_path(self) -> Path:
        return require_file(self.gemma2, OPTION, "Gemma 2 encodes the prompts")

    def dit_header(self) -> DitHeader[LuminaConfig]:
        """Read dimensions, dialect and dtype of the transformer file."""
        return read_once(self.dit_path, read_dit_header)

    def compute_dtype(self) -> torch.dtype | None:
        """Return the transformer's compute dtype; None if there is no transformer."""
        return self.dit_dtype or (None if self.dit is None else self.dit_header().compute_dtype)

    def text_encoder(self) -> GemmaTextEncoder:
        """Return the text encoder; its file is opened when it is loaded."""
        return GemmaTextEncoder(
            self.gemma2_path,
            self._beside(self.text_dtype),
            self.gemma2_tokenizer,
            self.system_prompt,
            self.system_prompt_in_negative,
            self.max_tokens,
        )

    def load_ae(self, device: torch.device) -> Autoencoder:
        """Load the autoencoder."""
        return load_autoencoder(self.ae_path, device, self._beside(self.ae_dtype), self.ae_tile)

    def ae_identity(self) -> Mapping[str, str]:
        """Return the facts that latents depend on besides the pixels."""
        return autoencoder_identity(self.ae_path, self._beside(self.ae_dtype), self.ae_tile)

    def check(self, needed: Collection[str] = ()) -> None:
        """Check the files that are given or needed ("dit", "ae", "gemma2"). Loads nothing.

        Raises OptionError if a needed one is not given, CheckpointError if a file is missing, or another kind
        or size of network than the transformer takes.
        """
        takes = None
        if self.dit is not None or "dit" in needed:
            takes = self.dit_header().config.text_dim
        if self.ae is not None or "ae" in needed:
            read_autoencoder_header(self.ae_path)
        if self.gemma2 is not None or "gemma2" in needed:
            path = self.text_encoder().path
            check_state_width(OPTION, path, read_once(path, _gemma_width), self.dit, takes, FILES)
        if self.gemma2_tokenizer is not None:
            GEMMA_FILES.check_given(self.gemma2_tokenizer)

    def _beside(self, chosen: torch.dtype | None) -> torch.dtype:
        return dtype_beside(chosen, self.compute_dtype(), USUAL)


def _gemma_width(checkpoint: Checkpoint) -> int:
    return read_gemma(checkpoint).config.dim
