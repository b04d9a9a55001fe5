"""Files of the text encoders that HunyuanImage-2.1 and HunyuanVideo 1.5 have: Qwen2.5-VL and ByT5."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from checkpoints.encoders import check_state_width
from checkpoints.model_files import read_once, require_file
from checkpoints.opening import Checkpoint
from encoders.files import TransformerFiles
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelEncoder
from encoders.language_models import QWEN25_VL, read_language_model
from encoders.t5 import BYT5, read_byt5_header
from hunyuan_image.options import HunyuanImageTextOptions
from hunyuan_image.text_encoders import GlyphTextEncoder
from modules.devices import select_compute_dtype
from modules.speed_options import text_form
from protocols.family import TextEncoder

TEXT_DTYPE = torch.bfloat16  # dtype of the language model, as released


@dataclass(frozen=True)
class QwenAndByt5Files(TransformerFiles):
    """Model files of a run: those of the transformer, the language model of Qwen2.5-VL, and ByT5."""

    text_encoder: Path | None = None
    text_encoder_tokenizer: Path | None = None
    byt5: Path | None = None
    text_form: str | None = None
    text_on_cpu: bool = False

    default_text_dtype: ClassVar[torch.dtype] = torch.float16
    # of a subclass: how it uses the language model, its encoder for quoted words, and what these words are in
    language_settings: ClassVar[LanguageEncoderSettings]
    glyph_encoder: ClassVar[type[GlyphTextEncoder]]
    writes_texts_in: ClassVar[str]

    def add_text(self, options: HunyuanImageTextOptions) -> Self:
        """Return a copy with the text encoders' paths and settings from `options`."""
        return replace(
            self,
            text_encoder=options.text_encoder,
            text_encoder_tokenizer=options.text_encoder_tokenizer,
            byt5=options.byt5,
            text_dtype=select_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            text_form=text_form(options),
            text_on_cpu=options.text_encoder_cpu,
        )

    @property
    def text_encoder_path(self) -> Path:
        """Return Qwen2.5-VL's path; raise OptionError if --text_encoder is missing."""
        what = "Qwen2.5-VL's language model encodes the prompts"
        return require_file(self.text_encoder, QWEN25_VL.option, what)

    @property
    def byt5_path(self) -> Path:
        """Return ByT5's path; raise OptionError if --byt5 is missing."""
        what = f"ByT5 encodes the texts to be written in the {self.writes_texts_in}"
        return require_file(self.byt5, BYT5.option, what)

    def language_model(self) -> LanguageModelEncoder:
        """Return the language model's encoder; its file is opened when it is loaded."""
        return LanguageModelEncoder(
            self.language_settings,
            self.text_encoder_path,
            dtype=self.encoder_dtype(self.text_dtype, TEXT_DTYPE),
            tokenizer=self.text_encoder_tokenizer,
            form=self.text_form,
            on_cpu=self.text_on_cpu,
        )

    def text_encoders(self) -> list[TextEncoder]:
        """Return the language model and ByT5, whose weights are read when they are loaded."""
        dtype = self.encoder_dtype(self.text_dtype)
        return [self.language_model(), self.glyph_encoder(self.byt5_path, dtype, self.text_on_cpu)]

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check that text encoders, if given or `needed`, fit their options and the transformer."""
        settings = self.language_settings
        if self.text_encoder is not None or needed:
            path = self.language_model().path
            width = read_once(path, _read_text_width, settings.states)
            takes = None if config is None else config.text_dim
            check_state_width(QWEN25_VL.option, path, width, self.dit, takes, QWEN25_VL.files)
        if self.byt5 is not None or needed:
            path = self.glyph_encoder(self.byt5_path).path
            takes = None if config is None else config.glyph_dim
            check_state_width(BYT5.option, path, read_byt5_header(path).dim, self.dit, takes, BYT5.release)
        if self.text_encoder_tokenizer is not None:
            settings.source.files.check_option_value(self.text_encoder_tokenizer)


def _read_text_width(checkpoint: Checkpoint, states: tuple[int, ...]) -> int:
    return read_language_model(checkpoint, QWEN25_VL, states).config.dim
