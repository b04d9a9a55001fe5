"""Files of a Qwen-Image run: paths and dtypes, and the check that each fits its option."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from encoders.files import TransformerFiles
from encoders.language_encoder import LanguageModelEncoder, LanguageUse
from encoders.language_models import QWEN25_VL, read_language_model
from encoders.picture_prompts import read_vision_tower
from modules.checkpoints.encoders import check_state_width
from modules.checkpoints.model_files import inside, read_once, require_file
from modules.checkpoints.opening import Checkpoint
from modules.devices import choose_compute_dtype
from qwen_image.checkpoints import FORMAT
from qwen_image.options import NAME, QwenImageModelOptions, QwenImageTextOptions
from qwen_image.text_encoder import QWEN_USE
from wan.spec import LATENT as WAN_LATENT
from wan.vae import WanVae, load_vae
from wan.vae_checkpoints import check_latents, read_vae


@dataclass(frozen=True)
class QwenImageFiles(TransformerFiles):
    """Files of a run with Wan2.1's VAE and Qwen2.5-VL's language model."""

    text_encoder: Path | None = None
    text_encoder_tokenizer: Path | None = None
    text_in_fp8: bool = False
    text_on_cpu: bool = False
    text_use: LanguageUse = QWEN_USE

    format: ClassVar = FORMAT

    def add_text(self, options: QwenImageTextOptions) -> Self:
        """Return a copy with the options of the text encoder."""
        return replace(
            self,
            text_encoder=options.text_encoder,
            text_encoder_tokenizer=options.text_encoder_tokenizer,
            text_dtype=choose_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            text_in_fp8=options.fp8_vl,
            text_on_cpu=options.text_encoder_cpu,
        )

    @property
    def vae_path(self) -> Path:
        return inside(super().vae_path, "vae")

    @property
    def text_encoder_path(self) -> Path:
        return require_file(self.text_encoder, QWEN25_VL.option, "Qwen2.5-VL encodes the prompts")

    def qwen(self) -> LanguageModelEncoder:
        """Return the language model; its file is opened when it is loaded."""
        return LanguageModelEncoder(
            self.text_use,
            self.text_encoder_path,
            self.beside(self.text_dtype),
            self.text_encoder_tokenizer,
            self.text_in_fp8,
            self.text_on_cpu,
        )

    def load_vae(self, device: torch.device) -> WanVae:
        """Load the VAE."""
        return load_vae(self.vae_path, device, self.beside(self.vae_dtype), tile=self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is no VAE of the model."""
        check_latents(read_once(self.vae_path, read_vae).config, WAN_LATENT, self.vae_path, NAME)

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check the text encoder: `TransformerFiles.check_texts`."""
        if self.text_encoder is not None or needed:
            path, takes = self.qwen().path, None if config is None else config.text_dim
            width = read_once(path, _text_width)
            check_state_width(QWEN25_VL.option, path, width, self.dit, takes, QWEN25_VL.files)
            if self.text_use.pictures is not None:
                read_once(path, _read_tower)
        if self.text_encoder_tokenizer is not None:
            QWEN_USE.source.files.check_given(self.text_encoder_tokenizer)


def _text_width(checkpoint: Checkpoint) -> int:
    return read_language_model(checkpoint, QWEN25_VL).config.dim


def _read_tower(checkpoint: Checkpoint) -> Any:
    return read_vision_tower(checkpoint, QWEN25_VL)


def files_of(options: QwenImageModelOptions, use: LanguageUse) -> QwenImageFiles:
    """Return the files of a training or a generation."""
    dtype = choose_compute_dtype(options.dit_dtype, "--dit_dtype", None)
    return QwenImageFiles(options.dit, dtype, text_use=use).add_vae(options.vae.file).add_text(options.text)
