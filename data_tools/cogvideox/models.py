"""Describe and load the VAE and text encoders of a diffusers pipeline, in a folder or on the hub."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints.model_files import find_model_folder
from checkpoints.opening import fingerprint
from checkpoints.tokenizers import first_line
from modules.devices import dtype_name
from modules.errors import CheckpointError, OptionError, catch_panics
from modules.installation import hide_packages
from modules.options import Options, option
from modules.script_options import parse_options
from modules.text_files import parse_json, read_text
from protocols.data import Conditions, LatentSpec
from protocols.families import FAMILIES
from protocols.family import EncoderAbilities, TextEncoder
from protocols.requests import Prompt
from protocols.rules import CountTokens, TokenCount, count_covered_characters

MAX_TOKENS = 226  # of CogVideoX's text encoder

COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by the names in options
LATENT = LatentSpec(channels=16, stride=(4, 8, 8), pixel_step=16, frame_step=4)  # of CogVideoX
KEY = "prompt_embeds"  # of the text encoder's tensor in caches


class EncodingOptions(Options, title="encoding"):
    """Options for encoding: which model, with which dtype, tiling and batch size."""

    model_id: str | None = option(
        "folder of a diffusers pipeline, or its name on the hub: of Wan, HunyuanVideo or CogVideoX, "
        "with vae, text_encoder and tokenizer"
    )
    save_latents_and_embeddings: bool = option(
        "also save the VAE's moments of each clip, and the text encoder's output for its caption",
        needs="model_id",
        hint="its VAE and text encoder compute them",
    )
    save_image_latents: bool = option(
        "also save the moments of first frames alone", needs="save_latents_and_embeddings"
    )
    max_sequence_length: int = option(
        "tokens of a caption for CogVideoX; the text encoders of Wan and HunyuanVideo have their own numbers",
        default=MAX_TOKENS,
        minimum=1,
        maximum=4096,
    )
    dtype: str = option(
        "dtype in which the VAE computes and its moments are saved; also for CogVideoX's text encoder, "
        "while other encoders keep the dtype that they are cached with",
        default="fp32",
        choices=tuple(DTYPES),
    )
    use_slicing: bool = option("encode the clips of a batch one by one")
    use_tiling: bool = option("encode large frames in tiles: less memory")
    batch_size: int = option("clips or captions per batch", default=1, minimum=1, maximum=1024)
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best one available")
    pin_memory: bool = option("copy frames to a GPU through pinned memory: faster")


class PipelineFamily(NamedTuple):
    """How a model family encodes with the networks of its diffusers pipeline."""

    name: str
    # name of a pipeline's component -> option of the family's text caching script
    text_options: Mapping[str, str]
    token_rule: str  # sentence on how many tokens its text encoders read, for a message


# by the class of a pipeline's VAE
PIPELINE_FAMILIES: Mapping[str, PipelineFamily] = {
    "AutoencoderKLWan": PipelineFamily(
        "wan",
        {"text_encoder": "--t5", "tokenizer": "--t5_tokenizer"},
        "the text encoder of Wan reads 512 tokens and returns as many rows as a caption has",
    ),
    "AutoencoderKLHunyuanVideo": PipelineFamily(
        "hunyuan_video",
        {
            "text_encoder": "--text_encoder1",
            "text_encoder_2": "--text_encoder2",
            "tokenizer": "--text_encoder1_tokenizer",
            "tokenizer_2": "--text_encoder2_tokenizer",
        },
        "the text encoders of HunyuanVideo read 256 and 77 tokens, which its transformer expects",
    ),
}
COGVIDEOX = "AutoencoderKLCogVideoX"

# pixels B 3 F H W in -1..1 -> moments B 2C f h w: means, then logarithms of variances, before normalization
EncodeMoments = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PipelineNetworks:
    """The VAE and text encoders of a diffusers pipeline, which are loaded only when they are used."""

    architecture: str  # `Family.name` of the model
    latent: LatentSpec
    vae_identity: Mapping[str, str]  # values that moments depend on, besides the pixels
    round_down_frames: Callable[[int], int]  # rounds a number of frames down to one that the VAE takes
    load_vae: Callable[[torch.device], EncodeMoments]
    text_encoders: Sequence[TextEncoder]


def describe_networks(options: EncodingOptions) -> PipelineNetworks:
    """Describe the networks of a diffusers pipeline for encoding; a repository is downloaded first.

    Raises:
        CheckpointError: If a component is missing or belongs to a different model.
        OptionError: If the number of tokens is not possible.
        InstallationError: If a package is missing.
        DownloadError: If the repository cannot be downloaded.
    """
    patterns = ["model_index.json", *(f"{component}/*" for component in COMPONENTS)]
    folder = find_model_folder("--model_id", str(options.model_id), patterns)
    hint = "Pass the folder of a diffusers pipeline, with vae, text_encoder and tokenizer."
    if not (folder / "text_encoder").is_dir():
        raise CheckpointError(f"--model_id {folder} has no folder text_encoder. {hint}", folder)
    # the class of the VAE identifies the model
    path = folder / "vae" / "config.json"
    try:
        vae_class = str(parse_json(read_text(path))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{path} does not say what the VAE is ({type(error).__name__}: {error})"
        raise CheckpointError(f"--model_id {folder}: {why}. {hint}", path) from error
    if vae_class == COGVIDEOX:
        return describe_cogvideox_networks(folder, options)
    if vae_class not in PIPELINE_FAMILIES:
        names = ", ".join((*PIPELINE_FAMILIES, COGVIDEOX))
        text = f"--model_id {options.model_id}: its VAE is {vae_class}; supported: {names}"
        raise CheckpointError(text, folder)
    family = PIPELINE_FAMILIES[vae_class]
    # only for CogVideoX can the number of tokens be chosen
    if options.max_sequence_length != MAX_TOKENS:
        raise OptionError(
            f"--max_sequence_length {options.max_sequence_length}: {family.token_rule}. Omit the option."
        )
    return _describe_family_networks(family, folder, options)


def _describe_family_networks(
    family: PipelineFamily, folder: Path, options: EncodingOptions
) -> PipelineNetworks:
    """Describe the networks of a family, made with the options of its caching scripts."""
    entry = FAMILIES[family.name]
    dtype = dtype_name(DTYPES[options.dtype])
    latent_argv = ["--vae", str(folder / "vae"), "--vae_dtype", dtype]
    if options.use_tiling:
        latent_argv.append("--vae_tiling")
    media_family = entry.make_family(
        "latent_caching", *parse_options(None, latent_argv, entry.options_record("LatentCaching"))
    )
    text_argv = []
    for component, flag in family.text_options.items():
        # a tokenizer is optional; the family reports a missing text encoder
        if component.startswith("text") or (folder / component).exists():
            text_argv += [flag, str(folder / component)]
    text_family = entry.make_family(
        "text_caching", *parse_options(None, text_argv, entry.options_record("TextCaching"))
    )
    # called only to raise errors about missing or wrong files
    media_family.check_named_files()
    text_family.check_named_files()
    return PipelineNetworks(
        architecture=media_family.name,
        latent=media_family.latent,
        vae_identity=media_family.media_identity,
        round_down_frames=media_family.latent.lengths.fit,
        load_vae=lambda device: media_family.media_encoders(device).vae.moments,
        text_encoders=text_family.text_encoders(),
    )


# --- CogVideoX's own networks, from the packages diffusers and transformers
# ------------------------------------------------------------------------------------------------------------


def describe_cogvideox_networks(folder: Path, options: EncodingOptions) -> PipelineNetworks:
    """Describe the networks of a CogVideoX pipeline, without loading them.

    Raises:
        CheckpointError: If a part is missing.
        InstallationError: If a package is missing.
    """
    for subfolder in ("vae", "text_encoder", "tokenizer"):
        if not (folder / subfolder).is_dir():
            raise CheckpointError(f"--model_id {folder} has no folder {subfolder}", folder)
    diffusers, _ = _import_packages()
    dtype = DTYPES[options.dtype]

    def load_vae(device: torch.device) -> EncodeMoments:
        """Load the VAE and return the function that encodes pixels to moments."""
        vae = _load_component(diffusers.AutoencoderKLCogVideoX, folder / "vae", torch_dtype=dtype)
        vae = vae.to(device).eval()
        if options.use_tiling:
            vae.enable_tiling()
        return lambda pixels: vae.encode(pixels.to(dtype)).latent_dist.parameters

    return PipelineNetworks(
        architecture="cogvideox",
        latent=LATENT,
        vae_identity={
            "vae": fingerprint(folder / "vae"),
            "vae_dtype": dtype_name(dtype),
            "tile": str(options.use_tiling),
        },
        round_down_frames=round_down_frames,
        load_vae=load_vae,
        text_encoders=(CogTextEncoder(folder, dtype, options.max_sequence_length),),
    )


def round_down_frames(frames: int) -> int:
    """Return the largest 4n or 4n + 1 up to `frames` (at least 1), the lengths that the VAE accepts."""
    if frames % 4 in (0, 1):
        return frames
    return max(1, frames // 4 * 4)


class CogTextEncoder:
    """T5 text encoder with its tokenizer; shared loops call load, encode and free."""

    name = "t5_xxl"
    keys = frozenset({KEY})
    abilities = EncoderAbilities()
    variable_length: frozenset[str] = frozenset()

    def __init__(self, folder: Path, dtype: torch.dtype, max_tokens: int) -> None:
        """Store the settings of a pipeline's T5 encoder; `load` reads its files."""
        self.folder = folder
        self.dtype = dtype
        self.max_tokens = max_tokens
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def identity(self) -> Mapping[str, str]:
        """Return what cached embeddings depend on: checkpoint fingerprint, dtype and maximum token count."""
        return {
            "t5_xxl": fingerprint(self.folder / "text_encoder"),
            "t5_xxl_dtype": dtype_name(self.dtype),
            "t5_xxl_tokens": str(self.max_tokens),
        }

    def token_counter(self) -> CountTokens:
        """Return a function that counts a caption's tokens with the end token; only the tokenizer is loaded.

        Raises:
            CheckpointError: If the tokenizer does not return the offsets of tokens in a text.
        """
        tokenizer = self._load_tokenizer()
        if not tokenizer.is_fast:
            raise CheckpointError(f"{self.folder / 'tokenizer'} does not say where its tokens are")

        def count(text: str) -> TokenCount:
            """Return how many tokens a caption has, and how many characters fit within the maximum."""
            ends = [end for _, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
            # the last token is the end token, which covers no text
            num_characters = count_covered_characters(ends[:-1], self.max_tokens - 1, len(text))
            return TokenCount(text, len(ends), self.max_tokens, num_characters)

        return count

    def load(self, device: torch.device) -> None:
        """Load the tokenizer and the T5 encoder onto `device`."""
        _, transformers = _import_packages()
        self._tokenizer = self._load_tokenizer()
        model = _load_component(
            transformers.T5EncoderModel, self.folder / "text_encoder", torch_dtype=self.dtype
        )
        self._model = model.to(device).eval()

    def _load_tokenizer(self) -> Any:
        """Load the T5 tokenizer from the pipeline's folder."""
        return _load_component(_import_packages()[1].AutoTokenizer, self.folder / "tokenizer")

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Encode prompts to {"prompt_embeds": T C} on the CPU, padded to T = `max_tokens`."""
        ids = self._tokenizer(
            [prompt.text for prompt in prompts],
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).input_ids
        # without a mask, because the model was trained with embeddings of padding tokens
        states = self._model(ids.to(self._model.device))[0].to(self.dtype).cpu()
        return [{KEY: state.clone()} for state in states]

    def free(self) -> None:
        """Release the tokenizer and the T5 encoder."""
        self._model = self._tokenizer = None


def _load_component(kind: Any, folder: Path, **settings: Any) -> Any:
    """Load a component of a pipeline from its folder, without executing code or unpickling."""
    weights = {"use_safetensors": True} if settings else {}
    try:
        with catch_panics():
            return kind.from_pretrained(folder, local_files_only=True, **weights, **settings)
    except Exception as error:  # the packages raise nothing more precise
        raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}", folder) from error


def _import_packages() -> tuple[Any, Any]:
    """Import diffusers and transformers, which takes seconds, only when a network is needed."""
    with hide_packages("bitsandbytes"):  # imported if it is installed, but unused here
        import diffusers  # slow
        import transformers

    return diffusers, transformers
