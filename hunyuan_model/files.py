"""The files of one HunyuanVideo run: where each is, and that it is what its option says."""

from dataclasses import dataclass
from pathlib import Path

from hunyuan_model.checkpoints import read_dit_header
from hunyuan_model.configs import HunyuanVideoConfig
from hunyuan_model.text_checkpoints import CLIP_FILES, LLAMA_FILES, read_clip_text, read_llama
from hunyuan_model.text_encoders import ClipTextEncoder, LlavaTextEncoder
from hunyuan_model.vae_checkpoints import read_vae
from modules.checkpoint import Checkpoint
from modules.dit_files import DitHeader
from modules.errors import CheckpointError
from modules.model_files import existing, read_once


@dataclass(frozen=True)
class HunyuanFiles:
    """Paths as given. The properties return a path that exists, or raise OptionError or CheckpointError naming the option."""

    dit: Path | None = None
    vae: Path | None = None
    text_encoder1: Path | None = None
    text_encoder2: Path | None = None
    text_encoder1_tokenizer: Path | None = None
    text_encoder2_tokenizer: Path | None = None

    @property
    def dit_path(self) -> Path:
        return existing(self.dit, "--dit", "the transformer checkpoint")

    @property
    def vae_path(self) -> Path:
        return existing(self.vae, "--vae", "it turns pixels into latents and back")

    @property
    def text_encoder1_path(self) -> Path:
        return existing(self.text_encoder1, "--text_encoder1", "the prompts are encoded by LLaVA's language model")

    @property
    def text_encoder2_path(self) -> Path:
        return existing(self.text_encoder2, "--text_encoder2", "the prompts are encoded by CLIP-L too")

    def dit_header(self) -> DitHeader[HunyuanVideoConfig]:
        """What the transformer file says of itself."""
        return read_once(self.dit_path, read_dit_header)

    def check_encoders(self) -> None:
        """Raise CheckpointError where a given file is another kind or size of network, before any is loaded."""
        if self.vae is not None:
            read_once(self.vae_path, read_vae)
        dit = self.dit_header().config
        if self.text_encoder1 is not None:
            path = LlavaTextEncoder(self.text_encoder1_path).path
            self._check_width("--text_encoder1", path, read_once(path, _llama_width), dit.text_dim, LLAMA_FILES)
        if self.text_encoder2 is not None:
            path = ClipTextEncoder(self.text_encoder2_path).path
            self._check_width("--text_encoder2", path, read_once(path, _clip_width), dit.pooled_dim, CLIP_FILES)

    def _check_width(self, option: str, path: Path, width: int, taken: int, give: str) -> None:
        if width != taken:
            raise CheckpointError(
                f"{option} {path} gives states of {width} numbers, {self.dit_path} takes {taken}. Give {give}.", path
            )


def _llama_width(checkpoint: Checkpoint) -> int:
    return read_llama(checkpoint, skip_layers=0, final_norm=False).config.dim  # which state is asked for does not change it


def _clip_width(checkpoint: Checkpoint) -> int:
    return read_clip_text(checkpoint).config.dim
