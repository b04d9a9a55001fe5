"""The records that the parts of Stable Diffusion exchange.

Data flow of a batch: prompts -> `RequestedImage`s with equal `ImageSettings` -> `TextState`s and a start ->
the denoising loop, with `UnetHook`s around U-Net calls -> `StageResult`. Networks and samplers are
diffusers'.
"""
# Letters: B images, R rows of one call of the U-Net, L tokens, C width, h w latent size

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from encoders.clip_layers import ClipText
from stable_diffusion.sampling_options import DeepShrinkOptions, GradualLatentOptions, SizeOptions


@dataclass(frozen=True)
class ModelKind:
    """Settings that distinguish Stable Diffusion 1.x, 2.x and XL; sizes are read from the tensors instead."""

    name: str  # "sd1", "sd2", "sdxl"
    title: str  # for messages: "Stable Diffusion 1.x"
    latent_scale: float  # factor on the autoencoder's output
    size: int  # usual width and height, pixels
    # without --clip_skip: the layer of the released text encoder whose states are used, from the end
    clip_skip: int
    lora_prefixes: tuple[str, ...]  # prefix of each text encoder's modules in LoRA files


SD1 = ModelKind(
    name="sd1",
    title="Stable Diffusion 1.x",
    latent_scale=0.18215,
    size=512,
    clip_skip=1,
    lora_prefixes=("lora_te",),
)
SD2 = ModelKind(
    name="sd2",
    title="Stable Diffusion 2.x",
    latent_scale=0.18215,
    size=512,
    clip_skip=2,
    lora_prefixes=("lora_te",),
)
SDXL = ModelKind(
    name="sdxl",
    title="Stable Diffusion XL",
    latent_scale=0.13025,
    size=1024,
    clip_skip=2,
    lora_prefixes=("lora_te1", "lora_te2"),
)
KINDS = (SD1, SD2, SDXL)


def text_encoder_name(number: int) -> str:
    """Return a text encoder's name in caches, training states and folders.

    Args:
        number: Index of the text encoder, from 0.
    """
    return f"text_encoder_{number + 1}" if number else "text_encoder"


@dataclass(eq=False)
class LoadedTextEncoder:
    """A text encoder and its tokenizer; textual inversion adds embedding rows and words to them."""

    network: ClipText
    tokenize: Callable[[str], list[int]]  # text -> any number of ids, without start and end token
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int  # pads the last chunk: `eos_token_id`, or 0 in OpenCLIP's encoders
    lora_prefix: str
    # last layers of the released network that are not loaded: 1 for SD 2, which was trained without it
    missing_layers: int = 0
    # per token: number of rows from its vector for one cross-attention to that for the next one; 0 if all
    # cross-attentions use the same vector. None: 0 for all tokens
    layer_strides: Tensor | None = None


@dataclass(eq=False)
class Model:
    """A loaded checkpoint: networks on `device`, in evaluation mode, without gradients."""

    kind: ModelKind
    path: Path
    # diffusers' UNet2DConditionModel and AutoencoderKL, whose attributes come from their `config`
    unet: Any
    vae: Any
    text_encoders: tuple[LoadedTextEncoder, ...]
    predicts_velocity: bool  # v-prediction; else noise
    zero_terminal_snr: bool  # as recorded in the file
    device: torch.device
    dtype: torch.dtype  # dtype of the U-Net and the text encoders
    vae_dtype: torch.dtype

    @property
    def is_inpainting(self) -> bool:
        """Whether the U-Net takes 9 channels: noisy latents, mask, and latents of the masked image."""
        return int(self.unet.config.in_channels) == 9


@dataclass(frozen=True)
class ImageSettings:
    """Settings shared by all images of a batch; hashable, because prompts are grouped by them."""

    width: int  # pixels, multiples of 8
    height: int
    steps: int
    scale: float
    negative_scale: float | None = None  # None: no third pass with the empty text
    strength: float = 0.8  # strength of image to image, and of a second stage without --highres_fix_strength
    sizes: SizeOptions = SizeOptions()
    multipliers: tuple[float, ...] | None = None  # --am, one per LoRA; None: the command line's strengths
    num_parts: int = 1  # number of parts of the prompt, separated by " AND "
    deep_shrink: DeepShrinkOptions | None = None
    gradual_latent: GradualLatentOptions | None = None


@dataclass(frozen=True)
class RequestedImage:
    """One image to generate; its variants are selected, its settings resolved and its files found."""

    label: str  # in messages: "line 3"
    prompt: str  # with weights, BREAK and AND; without variants
    negative_prompt: str
    seed: int
    settings: ImageSettings
    raw_prompt: str  # as the user wrote it
    image: Path | None = None  # image to image
    mask: Path | None = None  # white is repainted
    guides: tuple[Path, ...] = ()  # conditioning images of ControlNets or LLLites, or the mask of regions
    clip_prompt: str | None = None
    file_name: str | None = None  # --f


@dataclass(frozen=True, eq=False)
class TextState:
    """Text encoder outputs for one text."""

    # L C with L = 75 * chunks + 2; with --XTI_embeddings times the number of cross-attentions
    context: Tensor
    pooled: Tensor | None = None  # C; of SDXL


@dataclass(frozen=True, eq=False)
class UnetCall:
    """Inputs of one U-Net call; hooks may replace them."""

    step: int  # index of the step in the sampler's own list
    num_steps: int  # in that list
    timestep: float
    sample: Tensor  # R c h w, scaled as the sampler wants it
    context: Tensor  # R L C
    negative_rows: int  # number of rows of negative or empty texts, which come last
    added: Mapping[str, Tensor] = field(default_factory=dict)  # SDXL: text_embeds, time_ids
    # residuals of ControlNets: (one tensor for each skip connection, one for the middle)
    residuals: Any = None


# Looks at a call of the U-Net, may set up modules for it, and returns it, changed or not.
UnetHook = Callable[[UnetCall], UnetCall]


@dataclass(frozen=True, eq=False)
class SecondStageInput:
    """Images or latents that the second stage starts from, one per requested image."""

    images: Sequence[Image] | None = None
    latents: Tensor | None = None  # B 4 h w, scaled as the U-Net sees them


@dataclass(frozen=True, eq=False)
class StageResult:
    """Latents and images that one stage generates for a batch."""

    latents: Tensor  # B 4 h w, as the U-Net sees them, float32
    images: Sequence[Image] | None  # None if only latents were requested
