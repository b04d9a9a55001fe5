"""Files of a FLUX.2 run: paths and dtypes, and the check that each fits its option and the release."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from encoders.files import TransformerFiles
from encoders.language_encoder import LanguageModelEncoder, LanguageUse
from encoders.language_models import read_language_model
from flux_2.checkpoints import FORMAT, describe
from flux_2.configs import Flux2Config
from flux_2.options import Flux2GenerationOptions, Flux2TextOptions, Flux2TrainingOptions
from flux_2.vae import Flux2Vae, load_vae, read_vae
from flux_2.versions import VERSIONS, Flux2Version
from modules.checkpoints.dits import DitHeader
from modules.checkpoints.encoders import check_state_width
from modules.checkpoints.model_files import inside, read_once, require_file
from modules.checkpoints.opening import Checkpoint
from modules.devices import choose_compute_dtype
from modules.errors import OptionError


@dataclass(frozen=True)
class Flux2Files(TransformerFiles):
    """Files of a run with FLUX.2's autoencoder and the language model of its release."""

    model_version: str = "dev"
    text_encoder: Path | None = None
    text_encoder_tokenizer: Path | None = None
    text_in_fp8: bool = False
    text_on_cpu: bool = False

    format: ClassVar = FORMAT

    def add_text(self, options: Flux2TextOptions) -> Self:
        """Return a copy with the options of the text encoder."""
        return replace(
            self,
            text_encoder=options.text_encoder,
            text_encoder_tokenizer=options.text_encoder_tokenizer,
            text_dtype=choose_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            text_in_fp8=options.fp8_text_encoder,
            text_on_cpu=options.text_encoder_cpu,
        )

    @property
    def version(self) -> Flux2Version:
        """Return the facts of the release."""
        return VERSIONS[self.model_version]

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

    @property
    def text_encoder_path(self) -> Path:
        model = self.version.use.model
        return require_file(self.text_encoder, model.option, f"{model.what} encodes the prompts")

    def language_model(self) -> LanguageModelEncoder:
        """Return the language model; its file is opened when it is loaded."""
        return LanguageModelEncoder(
            self.version.use,
            self.text_encoder_path,
            self.beside(self.text_dtype),
            self.text_encoder_tokenizer,
            self.text_in_fp8,
            self.text_on_cpu,
        )

    def load_vae(self, device: torch.device) -> Flux2Vae:
        """Load the autoencoder."""
        return load_vae(self.vae_path, device, self.beside(self.vae_dtype), self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is no autoencoder of FLUX.2."""
        read_once(self.vae_path, read_vae)

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check the text encoder: `TransformerFiles.check_texts`."""
        use = self.version.use
        if self.text_encoder is not None or needed:
            path, takes = self.language_model().path, None if config is None else config.text_dim
            width = read_once(path, _width_reader(self.model_version))
            check_state_width(use.model.option, path, width, self.dit, takes, use.model.files)
        if self.text_encoder_tokenizer is not None:
            use.source.files.check_given(self.text_encoder_tokenizer)


@functools.cache  # `read_once` compares functions
def _width_reader(model_version: str) -> Callable[[Checkpoint], int]:
    """Return the function that reads how many numbers the joined states of a text encoder have."""
    return functools.partial(_joined_width, VERSIONS[model_version].use)


def _joined_width(use: LanguageUse, checkpoint: Checkpoint) -> int:
    return len(use.states) * read_language_model(checkpoint, use.model, use.states).config.dim


def files_of(options: Flux2TrainingOptions | Flux2GenerationOptions) -> Flux2Files:
    """Return the files of a training or a generation."""
    dtype = choose_compute_dtype(options.dit_dtype, "--dit_dtype", None)
    files = Flux2Files(options.dit, dtype, model_version=options.model_version)
    return files.add_vae(options.vae.file).add_text(options.text)
