"""Files of a Z-Image run: paths and dtypes, and the check that each fits its option."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from encoders.language_encoder import LanguageModelEncoder
from encoders.language_models import QWEN3, read_language_model
from encoders.pictures import AutoencoderFiles
from modules.checkpoints.encoders import check_state_width
from modules.checkpoints.model_files import read_once, require_file
from modules.checkpoints.opening import Checkpoint
from modules.devices import choose_compute_dtype
from z_image.checkpoints import FORMAT, OPTION
from z_image.options import ZImageModelOptions, ZImageTextOptions
from z_image.text_encoder import Z_IMAGE_USE


@dataclass(frozen=True)
class ZImageFiles(AutoencoderFiles):
    """Files of a run with FLUX.1's autoencoder and Qwen3."""

    dit_option: str = OPTION
    text_encoder: Path | None = None
    text_encoder_tokenizer: Path | None = None
    text_in_fp8: bool = False
    text_on_cpu: bool = False

    format: ClassVar = FORMAT
    vae_option: ClassVar[str] = "--vae"

    def add_text(self, options: ZImageTextOptions) -> Self:
        """Return a copy with the options of the text encoder."""
        return replace(
            self,
            text_encoder=options.text_encoder,
            text_encoder_tokenizer=options.text_encoder_tokenizer,
            text_dtype=choose_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            text_in_fp8=options.fp8_llm,
            text_on_cpu=options.text_encoder_cpu,
        )

    @property
    def text_encoder_path(self) -> Path:
        return require_file(self.text_encoder, QWEN3.option, "Qwen3 encodes the prompts")

    def qwen(self) -> LanguageModelEncoder:
        """Return the language model; its file is opened when it is loaded."""
        return LanguageModelEncoder(
            Z_IMAGE_USE,
            self.text_encoder_path,
            self.beside(self.text_dtype),
            self.text_encoder_tokenizer,
            self.text_in_fp8,
            self.text_on_cpu,
        )

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check the text encoder: `TransformerFiles.check_texts`."""
        if self.text_encoder is not None or needed:
            path, takes = self.qwen().path, None if config is None else config.text_dim
            width = read_once(path, _text_width)
            check_state_width(QWEN3.option, path, width, self.dit, takes, QWEN3.files)
        if self.text_encoder_tokenizer is not None:
            Z_IMAGE_USE.source.files.check_given(self.text_encoder_tokenizer)


def _text_width(checkpoint: Checkpoint) -> int:
    return read_language_model(checkpoint, QWEN3, Z_IMAGE_USE.states).config.dim


def files_of(options: ZImageModelOptions) -> ZImageFiles:
    """Return the files of a training or a generation."""
    dtype = choose_compute_dtype(options.dit_dtype, "--dit_dtype", None)
    return ZImageFiles(options.dit, dtype).add_vae(options.vae).add_text(options.text)
