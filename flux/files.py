"""Files of a FLUX.1 or Chroma run: their paths, and the check that each fits its option."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from encoders.clip_l import CLIP_L, ClipTextEncoder
from encoders.pictures import AutoencoderFiles
from encoders.t5 import USE, T5TextEncoder
from flux.checkpoints import FORMAT, NAMES, OPTION
from flux.configs import CHROMA, DEV, T5_TOKENS, FluxConfig
from flux.options import FluxTextOptions
from modules.checkpoints.dits import DitHeader
from modules.checkpoints.encoders import check_state_width
from modules.checkpoints.model_files import read_once, require_file
from modules.contract.family import TextEncoder
from modules.devices import choose_compute_dtype
from modules.errors import OptionError


@dataclass(frozen=True)
class FluxFiles(AutoencoderFiles):
    """Files of a run with CLIP-L and T5; the transformer's says whether it is dev, schnell or Chroma."""

    dit_option: str = OPTION
    says_chroma: bool = False  # --model_type chroma
    clip_l: Path | None = None
    t5xxl: Path | None = None
    clip_l_tokenizer: Path | None = None
    t5xxl_tokenizer: Path | None = None
    t5_in_fp8: bool = False
    max_tokens: int | None = None  # that T5 reads; None: as the transformer was trained
    masks_text: bool = False  # --apply_t5_attn_mask; always so for Chroma

    format: ClassVar = FORMAT
    clip_use: ClassVar = CLIP_L  # how options, messages and caches call the text encoders
    t5_use: ClassVar = USE

    def add_text(self, options: FluxTextOptions) -> "FluxFiles":
        """Return a copy with the options of the text encoders."""
        return replace(
            self,
            clip_l=options.clip_l,
            t5xxl=options.t5xxl,
            clip_l_tokenizer=options.clip_l_tokenizer,
            t5xxl_tokenizer=options.t5xxl_tokenizer,
            text_dtype=choose_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            t5_in_fp8=options.fp8_t5,
            max_tokens=options.t5xxl_max_token_length,
            masks_text=options.apply_t5_attn_mask,
        )

    @property
    def clip_l_path(self) -> Path:
        return require_file(self.clip_l, self.clip_use.option, "CLIP-L encodes the prompts")

    @property
    def t5xxl_path(self) -> Path:
        return require_file(self.t5xxl, self.t5_use.kind.option, "T5 encodes the prompts")

    def dit_header(self) -> DitHeader[FluxConfig]:
        """Read dimensions, dialect and dtype of the transformer file.

        Raises OptionError if it does not fit --model_type.
        """
        header = super().dit_header()
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
    def has_pooled(self) -> bool:
        """Whether CLIP-L is one of the encoders."""
        return self.kind != CHROMA

    @property
    def uses_mask(self) -> bool:
        """Whether T5 does not attend to padding."""
        return self.masks_text or self.kind == CHROMA

    @property
    def t5_tokens(self) -> int:
        """How many tokens T5 reads."""
        return self.max_tokens or T5_TOKENS[self.kind]

    def text_encoders(self) -> list[TextEncoder]:
        """Return CLIP-L (not of Chroma) and T5; their files are opened when they are loaded."""
        dtype = self.beside(self.text_dtype)
        t5 = T5TextEncoder(
            self.t5xxl_path,
            dtype,
            self.t5xxl_tokenizer,
            max_length=self.t5_tokens,
            uses_mask=self.uses_mask,
            in_fp8=self.t5_in_fp8,
            use=self.t5_use,
        )
        return [*([self._clip(dtype)] if self.has_pooled else []), t5]

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check CLIP-L and T5: `TransformerFiles.check_texts`."""
        pooled_dim, text_dim = (
            (None, None) if config is None else (config.pooled_dim or None, config.text_dim)
        )
        clip, t5 = self.clip_use, self.t5_use
        if self.clip_l is not None or (needed and self.has_pooled):
            path = self._clip().path
            check_state_width(
                clip.option, path, read_once(path, clip.read_width), self.dit, pooled_dim, clip.release
            )
        if self.t5xxl is not None or needed:
            path = T5TextEncoder(self.t5xxl_path).path
            check_state_width(
                t5.kind.option, path, read_once(path, t5.read_width), self.dit, text_dim, t5.kind.release
            )
        if self.clip_l_tokenizer is not None:
            clip.tokenizer.check_given(self.clip_l_tokenizer)
        if self.t5xxl_tokenizer is not None:
            t5.tokenizer.check_given(self.t5xxl_tokenizer)

    def _clip(self, dtype: torch.dtype = torch.bfloat16) -> ClipTextEncoder:
        return ClipTextEncoder(self.clip_l_path, dtype, self.clip_l_tokenizer, self.clip_use)
