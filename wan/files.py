"""Files of a Wan run: their paths, and the check that each fits its option."""

from dataclasses import dataclass
from pathlib import Path

from modules.checkpoints.dits import DitHeader
from modules.checkpoints.model_files import read_once, require_file
from modules.contract.data import LatentSpec
from wan.checkpoints import check_alike, check_task, read_dit_header
from wan.configs import WanConfig, WanTask
from wan.encoder_checkpoints import read_clip, read_t5
from wan.t5 import TOKENIZER
from wan.vae_checkpoints import check_latents, read_vae
from wan.vae_releases import RELEASES, VaeRelease


@dataclass(frozen=True)
class WanFiles:
    """Paths as the options give them.

    The properties return an existing path, or raise OptionError or CheckpointError naming the option.
    """

    dit: Path | None = None  # the low-noise expert's, or the only one
    vae: Path | None = None
    t5: Path | None = None
    t5_tokenizer: Path | None = None
    clip: Path | None = None
    dit_high_noise: Path | None = None

    @property
    def dit_path(self) -> Path:
        return require_file(self.dit, "--dit", "the transformer checkpoint")

    @property
    def has_dit(self) -> bool:
        """Whether a transformer is given."""
        return self.dit is not None or self.dit_high_noise is not None

    @property
    def dits(self) -> tuple[Path, ...]:
        """Transformers that are given, the one for little noise first; --dit must be unless the other is."""
        if self.dit_high_noise is None:
            return (self.dit_path,)
        high = require_file(self.dit_high_noise, "--dit_high_noise", "the transformer for much noise")
        return (high,) if self.dit is None else (self.dit_path, high)

    def check_dits(self, task: WanTask) -> None:
        """Raise OptionError or CheckpointError if a transformer is missing, or does not fit --task."""
        both = {"--dit": self.dit, "--dit_high_noise": self.dit_high_noise}
        paths = {option: path for option, path in both.items() if path in self.dits}
        headers = {option: read_once(path, read_dit_header) for option, path in paths.items()}
        for option, path in paths.items():
            check_task(headers[option], task, path, option)
        check_alike(headers, paths)

    @property
    def vae_path(self) -> Path:
        return require_file(self.vae, "--vae", "the VAE converts between pixels and latents")

    @property
    def t5_path(self) -> Path:
        return require_file(self.t5, "--t5", "the umT5 text encoder encodes the prompts")

    @property
    def clip_path(self) -> Path:
        return require_file(self.clip, "--clip", "the task is conditioned on image features")

    def dit_header(self) -> DitHeader[WanConfig]:
        """Read variant, dialect and dtype of the first transformer file; those of experts are alike."""
        return read_once(self.dits[0], read_dit_header)

    def check_encoders(self, *needed: str) -> None:
        """Check the files of encoders that are given or needed ("vae", "t5", "clip"). Loads nothing.

        Raises OptionError if a needed one is not given, CheckpointError if a file is missing or another kind
        of network.
        """
        if self.vae is not None or "vae" in needed:
            read_once(self.vae_path, read_vae)
        if self.t5 is not None or "t5" in needed:
            read_once(self.t5_path, read_t5)
        if self.clip is not None or "clip" in needed:
            read_once(self.clip_path, read_clip)

    def vae_release(self) -> VaeRelease | None:
        """Return which VAE is given; None if none is. Raises CheckpointError if the file is no VAE of Wan."""
        if self.vae is None:
            return None
        return RELEASES[read_once(self.vae_path, read_vae).config.latent_channels]

    def check_vae(self, latent: LatentSpec, needed_by: str) -> None:
        """Raise CheckpointError if a VAE is given that is not that of the model's latents.

        needed_by: the model in words, for the message: "--task ti2v-5B".
        """
        if self.vae is not None:
            check_latents(read_once(self.vae_path, read_vae).config, latent, self.vae_path, needed_by)

    def check_tokenizer(self) -> None:
        """Raise CheckpointError if --t5_tokenizer is given and names no tokenizer."""
        if self.t5_tokenizer is not None:
            TOKENIZER.files.check_given(self.t5_tokenizer)
