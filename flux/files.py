"""Files of a FLUX.1 or Chroma run: their paths, and the check that each is what its option says."""

import logging
from dataclasses import dataclass
from pathlib import Path

from flux.checkpoints import NAMES, OPTION, read_dit_header
from flux.configs import CHROMA, DEV, FluxConfig
from flux.encoders import CLIP, T5, FluxEncoderPaths
from modules.checkpoints.dits import DitHeader
from modules.checkpoints.model_files import read_once, require_file
from modules.errors import OptionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FluxFiles:
    """Paths as the options give them.

    `dit_path` returns an existing path, or raises OptionError or CheckpointError naming the option.
    """

    dit: Path | None = None
    encoders: FluxEncoderPaths = FluxEncoderPaths()
    says_chroma: bool = False  # --model_type chroma

    @property
    def dit_path(self) -> Path:
        return require_file(self.dit, OPTION, "the transformer checkpoint")

    def dit_header(self) -> DitHeader[FluxConfig]:
        """Read dimensions, dialect and dtype of the transformer file.

        Raises OptionError if it is not what --model_type says.
        """
        header = read_once(self.dit_path, read_dit_header)
        if self.says_chroma and header.kind != CHROMA:
            raise OptionError(
                f"--model_type chroma: {self.dit_path} is {NAMES[header.kind]}. Leave the option out, "
                "or give a Chroma checkpoint"
            )
        return header

    @property
    def kind(self) -> str:
        """DEV, SCHNELL or CHROMA; without a transformer what --model_type says."""
        if self.dit is None:
            return CHROMA if self.says_chroma else DEV
        return self.dit_header().kind

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Names of the text encoders that the model has, for `FluxEncoderPaths.check`."""
        return (T5,) if self.kind == CHROMA else (CLIP, T5)

    def check_encoders(self, *needed: str) -> None:
        """Check the files of encoders that are given or needed: `FluxEncoderPaths.check`."""
        config = self.dit_header().config
        self.encoders.check(needed, self.dit_path, config.text_dim, config.pooled_dim or None)
