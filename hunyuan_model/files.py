"""Files of a HunyuanVideo run: their paths, and the check that each fits its option."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from checkpoints.dits import DitFormat
from checkpoints.encoders import check_state_width
from checkpoints.model_files import read_once, require_file
from checkpoints.opening import Checkpoint
from encoders.clip_l import PooledClip
from encoders.files import TransformerFiles
from encoders.language_models import LLAMA, read_language_model
from hunyuan_model.checkpoints import FORMAT
from hunyuan_model.checkpoints import identify as identify  # files.py has it in every family's folder
from hunyuan_model.options import AS_TRAINED, HunyuanTextOptions, HunyuanVaeOptions, TextReadingOptions
from hunyuan_model.text_encoders import CLIP, LLAMA_TOKENIZER, HunyuanClip, LlavaTextEncoder, select_template
from hunyuan_model.token_refiner import HUNYUAN_REFINER, scale_text_tokens
from hunyuan_model.vae import TILE_FRAMES, HunyuanVae, load_vae
from hunyuan_model.vae_checkpoints import read_vae
from modules.devices import select_compute_dtype
from modules.speed_options import text_form
from protocols.family import TextEncoder


@dataclass(frozen=True)
class HunyuanFiles(TransformerFiles):
    """Model files of a run: transformer, HunyuanVideo's VAE, LLaVA's model, CLIP-L. Encoders are float16."""

    text_encoder1: Path | None = None
    text_encoder2: Path | None = None
    text_encoder1_tokenizer: Path | None = None
    text_encoder2_tokenizer: Path | None = None
    vae_tile_frames: int = TILE_FRAMES
    vae_chunk_size: int | None = None
    llm_form: str | None = None
    reading: TextReadingOptions = AS_TRAINED  # how texts are read

    refiner: ClassVar[tuple[str, str]] = HUNYUAN_REFINER
    encoders: ClassVar[tuple[type[LlavaTextEncoder], type[PooledClip]]] = (LlavaTextEncoder, HunyuanClip)
    format: ClassVar[DitFormat[Any, Any]] = FORMAT
    vae_folder: ClassVar[str] = "vae"
    default_text_dtype: ClassVar[torch.dtype] = torch.float16

    @property
    def text_encoder1_path(self) -> Path:
        """Path of the language model. Raises OptionError if --text_encoder1 is missing."""
        return require_file(
            self.text_encoder1, "--text_encoder1", "LLaVA's language model encodes the prompts"
        )

    @property
    def text_encoder2_path(self) -> Path:
        """Path of CLIP-L. Raises OptionError if --text_encoder2 is missing."""
        return require_file(self.text_encoder2, "--text_encoder2", "CLIP-L encodes the prompts too")

    def add_encoders(self, vae: HunyuanVaeOptions, text: HunyuanTextOptions) -> Self:
        """Return a copy with the paths and settings of the VAE and the text encoders."""
        return self.add_chunks(vae).add_text(text)

    def add_chunks(self, options: HunyuanVaeOptions) -> Self:
        """Return a copy with the VAE's path and settings from `options`."""
        return replace(self.add_vae(options.file), vae_chunk_size=options.vae_chunk_size)

    def add_text(self, options: HunyuanTextOptions) -> Self:
        """Return a copy with the text encoders' paths and settings from `options`."""
        return replace(
            self,
            text_encoder1=options.text_encoder1,
            text_encoder2=options.text_encoder2,
            text_encoder1_tokenizer=options.text_encoder1_tokenizer,
            text_encoder2_tokenizer=options.text_encoder2_tokenizer,
            text_dtype=select_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            llm_form=text_form(options),
        )

    def text_encoders(self) -> list[TextEncoder]:
        """Return the language model and CLIP-L, whose weights are read when they are loaded."""
        dtype = self.encoder_dtype(self.text_dtype)
        reading = self.reading
        llava_class, clip_class = self.encoders
        llava = llava_class(
            self.text_encoder1_path,
            dtype,
            self.text_encoder1_tokenizer,
            select_template(reading.custom_system_prompt),
            skip_layers=reading.hidden_state_skip_layer,
            final_norm=reading.apply_final_norm,
            form=self.llm_form,
        )
        return [llava, clip_class(self.text_encoder2_path, dtype, self.text_encoder2_tokenizer)]

    def scale_text_tokens(self, dit: nn.Module) -> nn.Module:
        """Scale the text tokens of a loaded transformer by --te_multiplier, and return the transformer."""
        if self.reading.text_multipliers is not None:
            scale_text_tokens(dit, self.refiner, *self.reading.text_multipliers)
        return dit

    def load_vae(self, device: torch.device) -> HunyuanVae:
        """Load the VAE with the options for its chunks and tiles."""
        return load_vae(
            self.vae_path,
            device,
            self.encoder_dtype(self.vae_dtype),
            chunk_size=self.vae_chunk_size,
            tile=self.vae_tile,
            tile_frames=self.vae_tile_frames,
        )

    def check_vae(self) -> None:
        """Raise CheckpointError if the file is not a VAE of HunyuanVideo."""
        read_once(self.vae_path, read_vae)

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check that each text encoder is of the kind of its option and fits the transformer.

        An encoder without an option is checked only if it is `needed`. `config` has the transformer's
        dimensions; without it only the files themselves are checked.
        """
        text_dim, pooled_dim = (None, None) if config is None else (config.text_dim, config.pooled_dim)
        if self.text_encoder1 is not None or needed:
            path = LlavaTextEncoder(self.text_encoder1_path).path
            width = read_once(path, _read_llama_width)
            check_state_width(
                "--text_encoder1", path, width=width, dit_path=self.dit, dit_width=text_dim, fits=LLAMA.files
            )
        if self.text_encoder2 is not None or needed:
            path = HunyuanClip(self.text_encoder2_path).path
            width = read_once(path, CLIP.read_width)
            check_state_width(
                "--text_encoder2",
                path,
                width=width,
                dit_path=self.dit,
                dit_width=pooled_dim,
                fits=CLIP.release,
            )
        if self.text_encoder1_tokenizer is not None:
            LLAMA_TOKENIZER.files.check_option_value(self.text_encoder1_tokenizer)
        if self.text_encoder2_tokenizer is not None:
            CLIP.tokenizer.check_option_value(self.text_encoder2_tokenizer)


def _read_llama_width(checkpoint: Checkpoint) -> int:
    return read_language_model(checkpoint, LLAMA).config.dim  # the same for every state
