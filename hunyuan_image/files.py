"""Files of a HunyuanImage-2.1 run: paths and dtypes, and the check that each fits its option."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from encoders.files import TransformerFiles
from encoders.t5 import BYT5, read_byt5_header
from hunyuan_image.checkpoints import FORMAT
from hunyuan_image.options import HunyuanImageTextOptions, HunyuanImageVaeOptions
from hunyuan_image.text_encoders import QWEN_USE, TOKENIZER, GlyphTextEncoder, QwenTextEncoder, read_qwen
from hunyuan_image.vae import HunyuanImageVae, load_vae
from hunyuan_image.vae_checkpoints import read_vae
from modules.checkpoints.encoders import check_state_width
from modules.checkpoints.model_files import inside, read_once, require_file
from modules.checkpoints.opening import Checkpoint
from modules.devices import choose_compute_dtype

TEXT_DTYPE = torch.bfloat16  # of the language model, as released


@dataclass(frozen=True)
class HunyuanImageFiles(TransformerFiles):
    """Files of a run with its own VAE, Qwen2.5-VL's language model and ByT5."""

    vae_chunk_size: int | None = None
    text_encoder: Path | None = None
    text_encoder_tokenizer: Path | None = None
    byt5: Path | None = None
    text_in_fp8: bool = False
    text_on_cpu: bool = False

    format: ClassVar = FORMAT
    usual: ClassVar[torch.dtype] = torch.float16

    def add_rows(self, options: HunyuanImageVaeOptions) -> "HunyuanImageFiles":
        """Return a copy with the options of the VAE."""
        files = self.add_vae(options.file)
        return replace(files, vae_tile=options.tile, vae_chunk_size=options.vae_chunk_size)

    def add_text(self, options: HunyuanImageTextOptions) -> "HunyuanImageFiles":
        """Return a copy with the options of the text encoders."""
        return replace(
            self,
            text_encoder=options.text_encoder,
            text_encoder_tokenizer=options.text_encoder_tokenizer,
            byt5=options.byt5,
            text_dtype=choose_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            text_in_fp8=options.fp8_vl,
            text_on_cpu=options.text_encoder_cpu,
        )

    @property
    def vae_path(self) -> Path:
        return inside(super().vae_path, "vae")

    @property
    def text_encoder_path(self) -> Path:
        what = "Qwen2.5-VL's language model encodes the prompts"
        return require_file(self.text_encoder, QWEN_USE.model.option, what)

    @property
    def byt5_path(self) -> Path:
        return require_file(self.byt5, BYT5.option, "ByT5 encodes the texts to be written in the picture")

    def qwen(self) -> QwenTextEncoder:
        """Return the language model; its file is opened when it is loaded."""
        return QwenTextEncoder(
            self.text_encoder_path,
            self.beside(self.text_dtype, TEXT_DTYPE),
            self.text_encoder_tokenizer,
            self.text_in_fp8,
            self.text_on_cpu,
        )

    def glyphs(self) -> GlyphTextEncoder:
        """Return the encoder of letters; its file is opened when it is loaded."""
        return GlyphTextEncoder(self.byt5_path, self.beside(self.text_dtype), self.text_on_cpu)

    def load_vae(self, device: torch.device) -> HunyuanImageVae:
        """Load the VAE. Raises as `hunyuan_image.vae.load_vae`."""
        dtype = self.beside(self.vae_dtype)
        return load_vae(self.vae_path, device, dtype, self.vae_chunk_size, self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is no VAE of the model."""
        read_once(self.vae_path, read_vae)

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check the text encoders: `TransformerFiles.check_texts`."""
        if self.text_encoder is not None or needed:
            path, takes = self.qwen().path, None if config is None else config.text_dim
            qwen, width = QWEN_USE.model, read_once(path, _text_width)
            check_state_width(qwen.option, path, width, self.dit, takes, qwen.files)
        if self.byt5 is not None or needed:
            path, takes = self.glyphs().path, None if config is None else config.glyph_dim
            check_state_width(BYT5.option, path, read_byt5_header(path).dim, self.dit, takes, BYT5.release)
        if self.text_encoder_tokenizer is not None:
            TOKENIZER.files.check_given(self.text_encoder_tokenizer)


def _text_width(checkpoint: Checkpoint) -> int:
    return read_qwen(checkpoint).dim
