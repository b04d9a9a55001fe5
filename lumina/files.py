"""Files of a Lumina-Image-2.0 run: their paths, and the check that each fits its option."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from encoders.pictures import AutoencoderFiles
from lumina.checkpoints import FORMAT
from lumina.gemma import FILES, OPTION, read_gemma
from lumina.options import MAX_TOKENS, LuminaTextOptions
from lumina.text_encoder import GEMMA_FILES, GemmaTextEncoder
from modules.checkpoints.encoders import check_state_width
from modules.checkpoints.model_files import read_once, require_file
from modules.checkpoints.opening import Checkpoint
from modules.devices import choose_compute_dtype


@dataclass(frozen=True)
class LuminaFiles(AutoencoderFiles):
    """Files of a run with Gemma 2, which overflows float16."""

    gemma2: Path | None = None
    gemma2_tokenizer: Path | None = None
    max_tokens: int = MAX_TOKENS
    system_prompt: str = ""
    system_prompt_in_negative: bool = False

    format: ClassVar = FORMAT

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
    def gemma2_path(self) -> Path:
        return require_file(self.gemma2, OPTION, "Gemma 2 encodes the prompts")

    def text_encoder(self) -> GemmaTextEncoder:
        """Return the text encoder; its file is opened when it is loaded."""
        return GemmaTextEncoder(
            self.gemma2_path,
            self.beside(self.text_dtype),
            self.gemma2_tokenizer,
            self.system_prompt,
            self.system_prompt_in_negative,
            self.max_tokens,
        )

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check the text encoders: `TransformerFiles.check_texts`."""
        if self.gemma2 is not None or needed:
            path, takes = self.text_encoder().path, None if config is None else config.text_dim
            check_state_width(OPTION, path, read_once(path, _gemma_width), self.dit, takes, FILES)
        if self.gemma2_tokenizer is not None:
            GEMMA_FILES.check_given(self.gemma2_tokenizer)


def _gemma_width(checkpoint: Checkpoint) -> int:
    return read_gemma(checkpoint).config.dim
