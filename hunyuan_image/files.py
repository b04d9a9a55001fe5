"""Files of a HunyuanImage-2.1 run: paths and dtypes, and the check that each fits its option."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from encoders.t5 import BYT5, read_byt5_header
from hunyuan_image.checkpoints import read_dit_header
from hunyuan_image.configs import HunyuanImageConfig
from hunyuan_image.options import HunyuanImageTextOptions, HunyuanImageVaeOptions
from hunyuan_image.text_encoders import QWEN, TOKENIZER, GlyphTextEncoder, QwenTextEncoder, read_qwen
from hunyuan_image.vae import HunyuanImageVae, load_vae
from hunyuan_image.vae_checkpoints import read_vae
from modules.checkpoints.dits import DitHeader
from modules.checkpoints.encoders import check_state_width, dtype_beside
from modules.checkpoints.model_files import inside, read_once, require_file
from modules.checkpoints.opening import Checkpoint, fingerprint
from modules.devices import choose_compute_dtype, dtype_name

TEXT_DTYPE, GLYPH_DTYPE, VAE_DTYPE = torch.bfloat16, torch.float16, torch.float16  # as released


@dataclass(frozen=True)
class HunyuanImageFiles:
    """Paths and dtypes as the options give them.

    The path properties raise OptionError or CheckpointError, naming the option. Encoders have the released
    dtype, or float32 beside a float32 transformer.
    """

    dit: Path | None = None
    dit_dtype: torch.dtype | None = None  # None: as the file says
    dit_option: str = "--dit"
    vae: Path | None = None
    vae_dtype: torch.dtype | None = None
    vae_tile: int | None = None
    vae_chunk_size: int | None = None
    text_encoder: Path | None = None
    text_encoder_tokenizer: Path | None = None
    byt5: Path | None = None
    text_dtype: torch.dtype | None = None
    text_in_fp8: bool = False
    text_on_cpu: bool = False

    def add_vae(self, options: HunyuanImageVaeOptions) -> "HunyuanImageFiles":
        """Return a copy with the options of the VAE."""
        return replace(
            self,
            vae=options.file.vae,
            vae_dtype=choose_compute_dtype(options.file.vae_dtype, "--vae_dtype", None),
            vae_tile=options.tile,
            vae_chunk_size=options.vae_chunk_size,
        )

    def add_text(self, options: HunyuanImageTextOptions) -> "HunyuanImageFiles":
        """Return a copy with the options of the text encoders."""
        return replace(
            self,
            text_encoder=options.text_encoder,
            text_encoder_tokenizer=options.text_encoder_tokenizer,
            byt5=options.byt5,
            text_dtype=choose_compute_dtype(options.text_encoder_dtype, "--text_encoder_dtype", None),
            text_in_fp8=options.fp8_vl,
            text_on_cpu=options.text_encoder_cpu,
        )

    @property
    def dit_path(self) -> Path:
        return require_file(self.dit, self.dit_option, "the transformer checkpoint")

    @property
    def vae_path(self) -> Path:
        return inside(require_file(self.vae, "--vae", "it turns pixels into latents and back"), "vae")

    @property
    def text_encoder_path(self) -> Path:
        return require_file(self.text_encoder, QWEN.option, "Qwen2.5-VL's language model encodes the prompts")

    @property
    def byt5_path(self) -> Path:
        return require_file(self.byt5, BYT5.option, "ByT5 encodes the texts to be written in the picture")

    def dit_header(self) -> DitHeader[HunyuanImageConfig]:
        """Read dimensions, dialect and dtype of the transformer file."""
        return read_once(self.dit_path, read_dit_header)

    def qwen(self) -> QwenTextEncoder:
        """Return the language model; its file is opened when it is loaded."""
        return QwenTextEncoder(
            self.text_encoder_path,
            self._beside(self.text_dtype, TEXT_DTYPE),
            self.text_encoder_tokenizer,
            self.text_in_fp8,
            self.text_on_cpu,
        )

    def glyphs(self) -> GlyphTextEncoder:
        """Return the encoder of letters; its file is opened when it is loaded."""
        return GlyphTextEncoder(self.byt5_path, self._beside(self.text_dtype, GLYPH_DTYPE), self.text_on_cpu)

    def load_vae(self, device: torch.device) -> HunyuanImageVae:
        """Load the VAE. Raises as `hunyuan_image.vae.load_vae`."""
        dtype = self._beside(self.vae_dtype, VAE_DTYPE)
        return load_vae(self.vae_path, device, dtype, self.vae_chunk_size, self.vae_tile)

    def vae_identity(self) -> Mapping[str, str]:
        """Return the facts that latents depend on besides the pixels."""
        dtype = dtype_name(self._beside(self.vae_dtype, VAE_DTYPE))
        return {"vae": fingerprint(self.vae_path), "vae_dtype": dtype, "tile": str(self.vae_tile)}

    def check(self, needed: Collection[str] = ()) -> None:
        """Check the files that are given or needed ("dit", "vae", "texts"). Loads nothing.

        Raises OptionError if a needed one is not given, CheckpointError if a file is missing, or another kind
        or size of network than the transformer takes.
        """
        config = None
        if self.dit is not None or "dit" in needed:
            config = self.dit_header().config
        if self.vae is not None or "vae" in needed:
            read_once(self.vae_path, read_vae)
        if self.text_encoder is not None or "texts" in needed:
            path = self.qwen().path
            width = read_once(path, _text_width)
            takes = None if config is None else config.text_dim
            check_state_width(QWEN.option, path, width, self.dit, takes, QWEN.files)
        if self.byt5 is not None or "texts" in needed:
            path = self.glyphs().path
            width = read_byt5_header(path).dim
            takes = None if config is None else config.glyph_dim
            check_state_width(BYT5.option, path, width, self.dit, takes, BYT5.release)
        if self.text_encoder_tokenizer is not None:
            TOKENIZER.check_given(self.text_encoder_tokenizer)

    def compute_dtype(self) -> torch.dtype | None:
        """Return the transformer's compute dtype; None if there is no transformer."""
        return self.dit_dtype or (None if self.dit is None else self.dit_header().compute_dtype)

    def _beside(self, chosen: torch.dtype | None, usual: torch.dtype) -> torch.dtype:
        return dtype_beside(chosen, self.compute_dtype(), usual)


def _text_width(checkpoint: Checkpoint) -> int:
    return read_qwen(checkpoint).dim
