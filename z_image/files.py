"""Files of a Z-Image run: paths and dtypes, and the check that each fits its option."""

from dataclasses import dataclass
from typing import ClassVar

from encoders.language_encoder import LanguageModelFiles, LanguageUse
from encoders.pictures import AutoencoderFiles
from modules.devices import choose_compute_dtype
from z_image.checkpoints import FORMAT, OPTION
from z_image.options import ZImageModelOptions
from z_image.text_encoder import Z_IMAGE_USE


@dataclass(frozen=True)
class ZImageFiles(AutoencoderFiles, LanguageModelFiles):
    """Files of a run with FLUX.1's autoencoder and Qwen3."""

    dit_option: str = OPTION

    format: ClassVar = FORMAT
    vae_option: ClassVar[str] = "--vae"

    @property
    def text_use(self) -> LanguageUse:
        """What is taken from the language model."""
        return Z_IMAGE_USE


def files_of(options: ZImageModelOptions) -> ZImageFiles:
    """Return the files of a training or a generation."""
    dtype = choose_compute_dtype(options.dit_dtype, "--dit_dtype", None)
    return ZImageFiles(options.dit, dtype).add_vae(options.vae).add_text(options.text)
