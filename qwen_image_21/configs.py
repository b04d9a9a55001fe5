"""Qwen-Image-2.1 as data: dimensions of its transformer, its source, latents, noise, names of parts."""

from collections.abc import Sequence
from dataclasses import dataclass

from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec
from protocols.few_steps import FewSteps
from protocols.rules import ModelRelease

QWEN_IMAGE_21 = ModelRelease(
    ("Qwen/Qwen-Image-2.1", "Qwen/Qwen-Image-2.1-Turbo"),
    "Qwen Research License",
    "other",
    "https://huggingface.co/Qwen/Qwen-Image-2.1/blob/main/LICENSE",
)
FEW_STEPS = FewSteps(
    base="Qwen-Image-2.1 itself",
    also="Turbo",
    adapter="the file of SimpleTuner/Qwen-Image-2.1-training-assistant-v3",
)


@dataclass(frozen=True)
class QwenImage21Config:
    """Dimensions of a Qwen-Image-2.1 transformer, read from a checkpoint's tensors and its config.json."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    channels: int  # number of latent channels
    text_dim: int  # width of the language model's states
    axes: tuple[int, int, int]  # channels of a head that encode a token's time, row and column
    freq_dim: int = 256
    rope_theta: float = 10000.0
    eps: float = 1e-6

    kind = "t2i"

    @property
    def head_width(self) -> int:
        """Return the number of channels of one attention head."""
        return self.dim // self.num_heads


def default_axes(head_width: int) -> tuple[int, int, int]:
    """Return the channels of a head for time, rows and columns if no config.json gives them.

    An eighth encodes the time. Each number is even: 16, 56 and 56 of the release's 128.
    """
    times = max(head_width // 16, 1) * 2
    rows = (head_width - times) // 4 * 2
    return times, rows, head_width - times - rows


def count_tokens(shape: Sequence[int]) -> int:
    """Return the number of tokens of an image of this shape, B C F H W: one for each latent pixel."""
    return shape[-2] * shape[-1]


# sides are multiples of 2 latent pixels: a token of the text encoder's vision tower represents 2 x 2
LATENT = LatentSpec(channels=64, stride=(1, 16, 16), pixel_step=32, frame_step=1, has_alpha=True)
NOISE = NoiseSpec(count_tokens=count_tokens)
DIT = DitSpec(
    block_lists=("transformer_blocks",),
    shared_inputs=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("img_mlp.gate_layer", "img_mlp.proj"),
    ),
    input_layers=("img_in", "txt_in"),
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    # they compute in float32; under 1 % of the model
    keep_float32=("time_text_embed.",),
)
