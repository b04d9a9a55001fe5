"""Files of a HunyuanVideo run: their paths, and the check that each is what its option says."""

from dataclasses import dataclass
from pathlib import Path

from hunyuan_model.checkpoints import read_dit_header
from hunyuan_model.configs import HunyuanVideoConfig
from hunyuan_model.encoders import HunyuanEncoderPaths
from modules.checkpoints.dits import DitHeader
from modules.checkpoints.model_files import read_once, require_file


@dataclass(frozen=True)
class HunyuanFiles:
    """Paths as the options give them.

    `dit_path` returns an existing path, or raises OptionError or CheckpointError naming the option.
    """

    dit: Path | None = None
    encoders: HunyuanEncoderPaths = HunyuanEncoderPaths()

    @property
    def dit_path(self) -> Path:
        return require_file(self.dit, "--dit", "the transformer checkpoint")

    def dit_header(self) -> DitHeader[HunyuanVideoConfig]:
        """Read dimensions, dialect and dtype of the transformer file."""
        return read_once(self.dit_path, read_dit_header)

    def check_encoders(self, *needed: str) -> None:
        """Check the files of encoders that are given or needed, as `HunyuanEncoderPaths.check`."""
        config = self.dit_header().config
        self.encoders.check(self.dit_path, config.text_dim, config.pooled_dim, needed)

    def check_given(self) -> None:
        """Check the files of encoders that are given, as `HunyuanEncoderPaths.check_given`."""
        self.encoders.check_given()
