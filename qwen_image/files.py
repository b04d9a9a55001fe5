"""Qwen-Image's releases as data, and the files of a run: paths and dtypes, each checked against its option.

Transformers of the releases look alike: the option says which one it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from encoders.language_encoder import LanguageModelFiles, LanguageUse
from modules.checkpoints.model_files import inside, read_once
from modules.contract.rules import ModelRelease, ReferenceRules
from qwen_image.checkpoints import FORMAT
from qwen_image.configs import EDIT_RELEASES, QWEN_IMAGE
from qwen_image.options import EDIT, EDIT_2509, EDIT_2511, NAME, ORIGINAL, QwenImageModelOptions
from qwen_image.text_encoder import EDIT_USE, PLUS_USE, QWEN_USE
from wan.spec import LATENT as WAN_LATENT
from wan.vae import WanVae, load_vae
from wan.vae_checkpoints import check_latents, read_vae

MOST = 10  # pictures to edit; trained with up to three


@dataclass(frozen=True)
class Version:
    """What a release takes beside a text."""

    name: str  # of the model in caches and saved files
    cache_tag: str
    called: str  # in messages
    release: ModelRelease
    use: LanguageUse
    references: ReferenceRules | None = None
    clean_references: bool = False  # their tokens are modulated with time 0


def _edits(option: str, use: LanguageUse, most: int, clean_references: bool = False) -> Version:
    rules = ReferenceRules(most, seen_by_text=True)
    called = f"{NAME}-{option.capitalize()}"
    return Version("qwen_image_edit", "qie", called, EDIT_RELEASES[option], use, rules, clean_references)


VERSIONS = {
    ORIGINAL: Version("qwen_image", "qi", NAME, QWEN_IMAGE, QWEN_USE),
    EDIT: _edits(EDIT, EDIT_USE, 1),
    EDIT_2509: _edits(EDIT_2509, PLUS_USE, MOST),
    EDIT_2511: _edits(EDIT_2511, PLUS_USE, MOST, clean_references=True),
}


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
    files = QwenImageFiles(text_use=use).add_dit(options.dit, options.dit_dtype)
    return files.add_vae(options.vae.file).add_text(options.text)
