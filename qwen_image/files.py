"""Files of a Qwen-Image run: paths and dtypes, and the check that each fits its option."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from encoders.language_encoder import LanguageModelFiles, LanguageUse
from modules.checkpoints.model_files import inside, read_once
from modules.devices import choose_compute_dtype
from qwen_image.checkpoints import FORMAT
from qwen_image.options import NAME, QwenImageModelOptions
from qwen_image.text_encoder import QWEN_USE
from wan.spec import LATENT as WAN_LATENT
from wan.vae import WanVae, load_vae
from wan.vae_checkpoints import check_latents, read_vae


@dataclass(frozen=True)
class QwenImageFiles(LanguageModelFiles):
    """Files of a run with Wan2.1's VAE and Qwen2.5-VL's language model."""

    text_use: LanguageUse = QWEN_USE

    format: ClassVar = FORMAT

    @property
    def vae_path(self) -> Path:
        return inside(super().vae_path, "vae")

    def load_vae(self, device: torch.device) -> WanVae:
        """Load the VAE."""
        return load_vae(self.vae_path, device, self.beside(self.vae_dtype), tile=self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is no VAE of the model."""
        check_latents(read_once(self.vae_path, read_vae).config, WAN_LATENT, self.vae_path, NAME)


def files_of(options: QwenImageModelOptions, use: LanguageUse) -> QwenImageFiles:
    """Return the files of a training or a generation."""
    dtype = choose_compute_dtype(options.dit_dtype, "--dit_dtype", None)
    return QwenImageFiles(options.dit, dtype, text_use=use).add_vae(options.vae.file).add_text(options.text)
