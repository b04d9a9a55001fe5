"""CogVideoX's own VAE and text encoder, from the packages diffusers and transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset.cogvideox.options import MAX_TOKENS
from modules.checkpoints.opening import fingerprint
from modules.contract.data import Conditions, LatentSpec
from modules.contract.family import EncodeMoments, MakerSettings, MomentsMaker
from modules.contract.requests import Prompt
from modules.contract.rules import CountTokens, TokenCount, kept_characters
from modules.devices import dtype_name
from modules.errors import CheckpointError, InstallationError

LATENT = LatentSpec(channels=16, stride=(4, 8, 8), pixel_step=16, frame_step=4)
KEY = "prompt_embeds"


def make_maker(folder: Path, settings: MakerSettings) -> MomentsMaker:
    """Describe the networks in a pipeline's folder; nothing is loaded.

    Raises CheckpointError if a part is missing, InstallationError if a package is.
    """
    for part in ("vae", "text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise CheckpointError(f"--model_id {folder} has no folder {part}", folder)
    _import("diffusers")
    _import("transformers")

    def load(device: torch.device) -> EncodeMoments:
        kind = _import("diffusers").AutoencoderKLCogVideoX
        vae = _load_part(kind, folder / "vae", torch_dtype=settings.dtype).to(device).eval()
        if settings.tiled:
            vae.enable_tiling()

        def encode(pixels: Tensor) -> Tensor:
            return vae.encode(pixels.to(settings.dtype)).latent_dist.parameters

        return encode

    return MomentsMaker(
        architecture="cogvideox",
        latent=LATENT,
        identity={
            "vae": fingerprint(folder / "vae"),
            "vae_dtype": dtype_name(settings.dtype),
            "tile": str(settings.tiled),
        },
        usable_frames=usable_frames,
        load=load,
        text_encoders=(CogTextEncoder(folder, settings.dtype, settings.max_tokens or MAX_TOKENS),),
    )


def usable_frames(frames: int) -> int:
    """Return the most frames of the form 4n or 4n + 1 up to a number; 1 at least."""
    return frames if frames % 4 < 2 else frames // 4 * 4 or 1


class CogTextEncoder:
    """T5 with its tokenizer, as the shared loops use it: load, encode, free."""

    name = "t5_xxl"
    keys = frozenset({KEY})
    variable_length: frozenset[str] = frozenset()

    def __init__(self, folder: Path, dtype: torch.dtype, max_tokens: int) -> None:
        """Set up the encoder of a pipeline's folder; `load` reads the files."""
        self.folder = folder
        self.dtype = dtype
        self.max_tokens = max_tokens
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def identity(self) -> Mapping[str, str]:
        """Return the fingerprint of the checkpoint, its dtype and the number of tokens."""
        return {
            "t5_xxl": fingerprint(self.folder / "text_encoder"),
            "t5_xxl_dtype": dtype_name(self.dtype),
            "t5_xxl_tokens": str(self.max_tokens),
        }

    def token_counter(self) -> CountTokens:
        """Return a function that counts a text's tokens with the end token; only the tokenizer is loaded.

        Raises CheckpointError if it does not give the places of tokens in a text.
        """
        tokenizer = _load_part(_import("transformers").AutoTokenizer, self.folder / "tokenizer")
        if not tokenizer.is_fast:
            raise CheckpointError(f"{self.folder / 'tokenizer'} does not say where its tokens are")

        def count(text: str) -> TokenCount:
            ends = [end for _, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
            kept = kept_characters(ends[:-1], self.max_tokens - 1, len(text))
            return TokenCount(text, len(ends), self.max_tokens, kept)

        return count

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer."""
        transformers = _import("transformers")
        self._tokenizer = _load_part(transformers.AutoTokenizer, self.folder / "tokenizer")
        model = _load_part(transformers.T5EncoderModel, self.folder / "text_encoder", torch_dtype=self.dtype)
        self._model = model.to(device).eval()

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return {"prompt_embeds": T C} on the CPU for each prompt; T: `max_tokens`, padding included."""
        ids = self._tokenizer(
            [prompt.text for prompt in prompts],
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).input_ids
        # without a mask: the model was trained with embeddings of padding
        states = self._model(ids.to(self._model.device))[0].to(self.dtype).cpu()
        return [{KEY: state.clone()} for state in states]

    def free(self) -> None:
        """Release the encoder and its memory."""
        self._model = self._tokenizer = None


def _load_part(kind: Any, folder: Path, **settings: Any) -> Any:
    """Load a part of a pipeline from its folder, and nothing that could run code.

    Raises CheckpointError if it cannot be read.
    """
    weights = {"use_safetensors": True} if settings else {}
    try:
        return kind.from_pretrained(folder, local_files_only=True, **weights, **settings)
    except Exception as error:  # the packages raise nothing more precise
        lines = str(error).strip().splitlines()
        why = lines[0] if lines else type(error).__name__
        raise CheckpointError(f"{folder} cannot be loaded: {why}", folder) from error


def _import(package: str) -> Any:
    try:
        if package == "diffusers":
            import diffusers

            return diffusers
        import transformers

        return transformers
    except ImportError as error:
        raise InstallationError(
            f"CogVideoX's own models need the package {package}: pip install diffusers transformers "
            "sentencepiece. Wan and HunyuanVideo need none."
        ) from error
