"""Krea 2 as data: dimensions of its transformer, its source, latents, noise, names of parts."""

from dataclasses import dataclass

from protocols.family import DitSpec, NoiseSpec, count_image_tokens
from protocols.few_steps import GUIDED, FewSteps, make_transfer_target
from protocols.rules import ModelRelease
from qwen_image.configs import LATENT as QWEN_LATENT

KREA_2 = ModelRelease(
    ("krea/Krea-2-Raw", "krea/Krea-2-Turbo"),
    "Krea 2 Community License",
    "other",
    "https://github.com/krea-ai/krea-2/blob/main/docs/KREA-2-COMMUNITY-LICENSE",
)
FEW_STEPS = FewSteps(
    base="raw (raw.safetensors)",
    also="Turbo",
    adapter="the file of ostris/krea2_turbo_training_adapter",
    targets=(GUIDED, make_transfer_target("raw", "raw.safetensors")),
    undistilled_pattern=r"(?<![a-z])raw(?=_|\d|bf|fp|$)",
)
PATCH = 2  # latent pixels along each side of a token
STATES = tuple(range(2, 36, 3))  # layers of Qwen3-VL before each state that is read


@dataclass(frozen=True)
class Krea2StreamConfig:
    """Dimensions of one stream's blocks."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int  # heads of keys and values; num_heads / num_kv_heads query heads share each of them
    eps: float = 1e-5

    @property
    def head_width(self) -> int:
        """Return the number of channels of one attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True)
class Krea2Config(Krea2StreamConfig):
    """Dimensions of a Krea 2 transformer, read from a checkpoint's tensors."""

    # the blocks over the language model's states
    text: Krea2StreamConfig = Krea2StreamConfig(2560, 6912, 20, 20)
    num_layers: int = 28
    layerwise_blocks: int = 2
    refiner_blocks: int = 2
    states: int = len(STATES)  # number of the language model's states for each token
    channels: int = 16  # number of latent channels
    freq_dim: int = 256
    rope_theta: float = 1000.0

    kind = "t2i"

    @property
    def text_dim(self) -> int:
        """Width of the language model's states."""
        return self.text.dim

    @property
    def rotary_widths(self) -> tuple[int, int, int]:
        """Return the channels of a head that encode the image index, the row and the column."""
        side = 6 * (self.head_width // 16)
        return self.head_width - 2 * side, side, side


LATENT = QWEN_LATENT  # the model shares Qwen-Image's VAE
NOISE = NoiseSpec(count_tokens=count_image_tokens)  # 1000 sigma + 1 in training, as the known trainer
DIT = DitSpec(
    block_lists=("blocks",),
    shared_inputs=(
        ("attn.wq", "attn.wk", "attn.wv", "attn.gate"),
        ("mlp.gate", "mlp.up"),
    ),
    lora_lists=("txtfusion", "first", "last", "tmlp", "txtmlp", "tproj"),  # all layers, as the known trainer
    input_layers=("first", "txtfusion", "txtmlp"),
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    keep_float32=("tmlp.",),  # as it computes so; under 1 % of the model
)
