"""Files of a FLUX.2 run: paths and dtypes, and the check that each fits its option and the release."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from encoders.language_encoder import LanguageModelFiles, LanguageUse
from flux_2.checkpoints import FORMAT, describe
from flux_2.configs import Flux2Config
from flux_2.options import Flux2GenerationOptions, Flux2TrainingOptions
from flux_2.vae import Flux2Vae, load_vae, read_vae
from flux_2.versions import VERSIONS, Flux2Version
from modules.checkpoints.dits import DitHeader
from modules.checkpoints.model_files import inside, read_once
from modules.errors import OptionError


@dataclass(frozen=True)
class Flux2Files(LanguageModelFiles):
    """Files of a run with FLUX.2's autoencoder and the language model of its release."""

    model_version: str = "dev"

    format: ClassVar = FORMAT

    @property
    def version(self) -> Flux2Version:
        """Return the facts of the release."""
        return VERSIONS[self.model_version]

    @property
    def text_use(self) -> LanguageUse:
        """What is taken from the language model."""
        return self.version.use

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check the text encoder; without a transformer it is compared with those of the releases."""
        super().check_texts(config, needed)
        if config is None and self.text_encoder is not None:
            width = self.text_width()
            fit = [name for name, one in VERSIONS.items() if one.text_dim == width]
            if fit and self.model_version not in fit:
                model = self.text_use.model
                raise OptionError(
                    f"{model.option} {self.text_encoder} is the text encoder of --model_version "
                    f"{' and '.join(fit)}, not of {self.model_version}. Give {model.files} or that version"
                )

    def dit_header(self) -> DitHeader[Flux2Config]:
        """Read dimensions, dialect and dtype of the file. Raises OptionError for another release's."""
        header: DitHeader[Flux2Config] = super().dit_header()
        takes_guidance = self.version.defaults.embedded_guidance is not None
        others = {one.dim: name for name, one in reversed(VERSIONS.items()) if one.dim != self.version.dim}
        if header.config.has_guidance != takes_guidance or header.config.dim in others:
            fit = others.get(header.config.dim, "klein-4b" if takes_guidance else "dev")
            raise OptionError(
                f"--dit {self.dit_path} is {describe(header)} of width {header.config.dim}, not that of "
                f"--model_version {self.model_version}. Give the version of the file, such as {fit}, or "
                "another file"
            )
        return header

    @property
    def vae_path(self) -> Path:
        return inside(super().vae_path, "vae")

    def load_vae(self, device: torch.device) -> Flux2Vae:
        """Load the autoencoder."""
        return load_vae(self.vae_path, device, self.beside(self.vae_dtype), self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is no autoencoder of FLUX.2."""
        read_once(self.vae_path, read_vae)


def files_of(options: Flux2TrainingOptions | Flux2GenerationOptions) -> Flux2Files:
    """Return the files of a training or a generation."""
    files = Flux2Files(model_version=options.model_version).add_dit(options.dit, options.dit_dtype)
    return files.add_vae(options.vae.file).add_text(options.text)
