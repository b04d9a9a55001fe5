"""Anima as data: dimensions of its transformer and adapter, its source, latents, noise, names of parts."""

from dataclasses import dataclass, replace

from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec, count_image_tokens
from protocols.few_steps import GUIDED, FewSteps, make_transfer_target
from protocols.rules import ModelRelease, NpzFormat
from qwen_image.configs import LATENT as QWEN_LATENT

ANIMA = ModelRelease(
    ("circlestone-labs/Anima", "circlestone-labs/Anima-Base-v1.0-Diffusers"),
    "CircleStone Labs Non-Commercial License",
    "other",
    "https://huggingface.co/circlestone-labs/Anima/blob/main/LICENSE.md",
)
FEW_STEPS = FewSteps(
    "the base (anima-base-v1.0.safetensors)",
    also="Turbo",
    targets=(GUIDED, make_transfer_target("the base", "anima-base-v1.0.safetensors")),
)
PATCH = 2  # latent pixels along each side of a token
TEXT_ROWS = 512  # number of rows of a text after the adapter, as trained
ADAPTER = "llm_adapter"  # its name in the transformer's file


@dataclass(frozen=True)
class AdapterConfig:
    """Dimensions of an adapter, read from a checkpoint's tensors."""

    dim: int  # width of T5's tokens, and of the rows that the transformer attends to
    text_dim: int  # width of the language model's states
    ffn_dim: int
    num_heads: int
    num_layers: int
    vocabulary: int
    rope_theta: float = 10000.0
    eps: float = 1e-6


@dataclass(frozen=True)
class AnimaConfig:
    """Dimensions of an Anima transformer, read from a checkpoint's tensors."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    context_dim: int  # width of the text's rows
    modulation_dim: int  # between the two layers that make shifts, scales and gates
    adapter: AdapterConfig | None  # None: it is not in the file
    channels: int = 16  # number of latent channels
    rope_theta: float = 10000.0
    # by which positions of time, rows and columns are stretched
    rope_ratios: tuple[float, float, float] = (1.0, 4.0, 4.0)
    eps: float = 1e-6

    kind = "t2i"

    @property
    def head_width(self) -> int:
        """Return the number of channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def rotary_widths(self) -> tuple[int, int, int]:
        """Return how many channels of each head encode time, row and column."""
        side = self.head_width // 6 * 2
        return self.head_width - 2 * side, side, side


_DROPOUT = "caption_dropout_rate"
# Qwen-Image's VAE. Caches contain the mean of its posterior
LATENT: LatentSpec = replace(
    QWEN_LATENT, npz=NpzFormat("_anima", "_anima_te", table_settings={_DROPOUT: _DROPOUT})
)
NOISE = NoiseSpec(training_offset=0.0, table_is_shifted=True, count_tokens=count_image_tokens)
DIT = DitSpec(
    block_lists=("blocks",),
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("cross_attn.k_proj", "cross_attn.v_proj"),
    ),
    fp8_exclude=("norm", "adaln_modulation"),
    lora_lists=(ADAPTER, "x_embedder", "t_embedder", "final_layer"),
    # as in the known trainer; train_llm_adapter=True adds the adapter's blocks
    lora_exclude=(
        *("_modulation", "_norm", "_embedder", ".final_layer"),
        *(f".{ADAPTER}.blocks.", f".{ADAPTER}.out_proj"),
    ),
    input_layers=("x_embedder", ADAPTER),
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    num_unswapped=2,
    # they compute in float32; 1 % of the model
    keep_float32=("t_embedder.", "t_embedding_norm."),
)
