"""The files of one HunyuanVideo run: where each is, and that it is what its option says."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hunyuan_model.checkpoints import DitHeader, read_dit_header
from hunyuan_model.text_checkpoints import CLIP_FILES, LLAMA_FILES, ClipTextConfig, LlamaConfig, read_clip_text, read_llama
from hunyuan_model.text_encoders import ClipTextEncoder, LlavaTextEncoder
from hunyuan_model.vae_checkpoints import read_vae
from modules.checkpoint import Checkpoint, open_checkpoint
from modules.dialects import LoadPlan
from modules.errors import CheckpointError
from modules.model_files import check_file, existing


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

    def dit_header(self) -> DitHeader:
        """What the transformer file says of itself."""
        return _header_of(self.dit_path)

    def check_encoders(self) -> None:
        """Raise CheckpointError where a given file is another kind or size of network, before any is loaded."""
        if self.vae is not None:
            check_file(self.vae_path, read_vae)
        if self.text_encoder1 is not None:
            path = LlavaTextEncoder(self.text_encoder1_path).path
            self._check_width("--text_encoder1", path, _width_of(path, _read_llama), self.dit_header().config.text_dim, LLAMA_FILES)
        if self.text_encoder2 is not None:
            path = ClipTextEncoder(self.text_encoder2_path).path
            self._check_width(
                "--text_encoder2", path, _width_of(path, read_clip_text), self.dit_header().config.pooled_dim, CLIP_FILES
            )

    def _check_width(self, option: str, path: Path, width: int, taken: int, give: str) -> None:
        if width != taken:
            raise CheckpointError(
                f"{option} {path} gives states of {width} numbers, {self.dit_path} takes {taken}. Give {give}.", path
            )


def _read_llama(checkpoint: Checkpoint) -> LoadPlan[LlamaConfig]:
    return read_llama(checkpoint, skip_layers=0, final_norm=False)  # whatever is asked of it: only kind and width are of interest


@lru_cache(maxsize=8)  # asked for with every prompt of a long list
def _width_of(path: Path, read: Callable[[Checkpoint], LoadPlan[LlamaConfig] | LoadPlan[ClipTextConfig]]) -> int:
    with open_checkpoint(path) as checkpoint:
        return read(checkpoint).config.dim


@lru_cache(maxsize=8)  # asked for with every prompt of a long list
def _header_of(path: Path) -> DitHeader:
    return read_dit_header(path)
