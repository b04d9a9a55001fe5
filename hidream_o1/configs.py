"""HiDream-O1-Image as data: dimensions of its network, its source, releases, noise, names of parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hidream_o1 import options as own
from hidream_o1.flash import vary_noise
from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec
from protocols.rules import ModelRelease

RELEASE = ModelRelease(
    ("HiDream-ai/HiDream-O1-Image", "HiDream-ai/HiDream-O1-Image-Dev"),
    "MIT",
    "mit",
    "https://opensource.org/license/mit",
)
PATCH = 32  # edge of a token in pixels


@dataclass(frozen=True)
class HiDreamO1VisionConfig:
    """Dimensions of the vision tower, read from a checkpoint's tensors and its config.json."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    position_side: int  # of the square grid of position embeddings
    patch_size: int  # edge of a patch in pixels
    frames: int  # of a patch; an image is equal ones
    merge: int  # patches along each edge of a token
    out_dim: int
    # layers whose features are added behind the decoder's first layers, each by its own merger (DeepStack)
    deep_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class HiDreamO1Config:
    """Dimensions of a HiDream-O1-Image network, read from a checkpoint's tensors."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int  # heads of keys and values
    head_width: int
    num_layers: int
    vocabulary: int  # number of token embeddings
    bottleneck: int  # width between the two layers that embed a patch
    patch_size: int = PATCH  # edge of a token in pixels
    freq_dim: int = 256
    rope_theta: float = 5e6
    eps: float = 1e-6
    vision: HiDreamO1VisionConfig | None = None  # None: the file has no vision tower

    kind = "t2i"

    @property
    def row_frequencies(self) -> int:
        """Return how many rotary frequencies of a head encode the row, and as many the column.

        All other frequencies encode the first axis: 24, 20 and 20 for a head of 128 channels.
        """
        return 5 * self.head_width // 32


def count_patches(shape: Sequence[int]) -> int:
    """Return the number of tokens of an image, for shifts that depend on its size.

    Args:
        shape: Shape of its pixels, B C F H W.
    """
    return (shape[-2] // PATCH) * (shape[-1] // PATCH)


@dataclass(frozen=True)
class HiDreamO1Variant:
    """Settings of a released variant; the tensors of all variants are equal."""

    name: str  # value of --model_type
    noise_scale: float  # standard deviation of pure noise, in pixels of -1..1
    steps: int
    guidance: float
    solver: str  # as `modules.flow.solvers` names it
    vary_noise: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None = None  # see `NoiseSpec`

    @property
    def latent(self) -> LatentSpec:
        """Return the latent space: pixels in -1..1, divided by the noise scale in model space.

        Divided, noise has the standard deviation 1 that the shared loops add.
        """
        colors = tuple(tuple(self.noise_scale * (row == column) for column in range(3)) for row in range(3))
        return LatentSpec(
            channels=3,
            stride=(1, 1, 1),
            pixel_step=PATCH,
            frame_step=1,
            scale=1 / self.noise_scale,
            preview_factors=colors,  # type: ignore[arg-type]  # three rows of three numbers
            flat_in_caches=True,
            names_frames=False,
        )

    @property
    def noise(self) -> NoiseSpec:
        """Return how training adds noise; the loss compares images, as the variant was trained."""
        return NoiseSpec(
            training_offset=0.0,
            count_tokens=count_patches,
            clean_loss_scale=self.noise_scale,
            vary_noise=self.vary_noise,
        )


FULL = HiDreamO1Variant(own.FULL, noise_scale=8.0, steps=own.STEPS, guidance=own.GUIDANCE, solver="unipc")
DEV = HiDreamO1Variant(
    own.DEV,
    noise_scale=7.5,
    steps=own.DEV_STEPS,
    guidance=own.DEV_GUIDANCE,
    solver="lcm",
    vary_noise=vary_noise,
)
VARIANTS = {variant.name: variant for variant in (FULL, DEV)}
DIT = DitSpec(
    block_lists=("language_model.layers",),
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ),
    fp8_exclude=("norm",),
    lora_lists=("x_embedder", "final_layer2", "visual"),  # the last one is loaded only for edits
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    keep_float32=("t_embedder1.",),  # computes in float32; 0.2 % of the model
)
