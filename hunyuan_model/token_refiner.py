"""Token refiner: a small bidirectional transformer from states of a language model to text tokens.

Source: the released model code and Kong et al. 2024, arXiv 2412.03603, section 4.3, after Ma et al. 2024,
arXiv 2406.11831.
"""
# Letters: B batch, T text tokens, N heads, D head width, C = N * D

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from hunyuan_model.blocks import split_heads
from hunyuan_model.configs import JointConfig
from modules.attention.attend import SampleLengths, attend, make_lengths
from modules.devices import tensor_on
from modules.layers.modulation import add_gated
from modules.layers.norms import Float32LayerNorm, TwoLayerMlp, run_float32, run_in_weight_dtype
from modules.layers.rope import sinusoid
from modules.speed_options import SDPA, AttentionChoice


class ScalarEmbedding(nn.Module):
    """Embeds one number per sample, such as the timestep, as B C float32."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.mlp = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, numbers: Tensor) -> Tensor:
        """Return embeddings, B C float32, of numbers, B."""
        # angles in float32, as in training, although they are rounded for a large guidance
        hidden = run_float32(self.mlp[0], sinusoid(numbers, self.freq_dim, torch.float32))
        return run_float32(self.mlp[2], functional.silu(hidden))


class RefinerBlock(nn.Module):
    """Self-attention and feed-forward among text tokens.

    The timestep and the mean of the text only gate the two branches.
    """

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.norm1 = Float32LayerNorm(dim, config.eps, affine=True)
        self.self_attn_qkv = nn.Linear(dim, 3 * dim)
        self.self_attn_proj = nn.Linear(dim, dim)
        self.norm2 = Float32LayerNorm(dim, config.eps, affine=True)
        self.mlp = TwoLayerMlp("fc1 fc2", (dim, config.refiner_ffn_dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(
        self, x: Tensor, vector: Tensor, lengths: SampleLengths | None, attention: AttentionChoice
    ) -> Tensor:
        """Apply the block to text tokens x, B T C. `vector` is B C float32."""
        # x: B T C    vector: B C float32
        rows = run_in_weight_dtype(self.adaLN_modulation[1], functional.silu(vector)).float()
        gate1, gate2 = rows.unsqueeze(1).chunk(2, dim=-1)
        q, k, v = split_heads(self.norm1(x).to(x.dtype), self.self_attn_qkv, self.num_heads)
        attended = attend(q, k, v, attention, lengths=lengths).flatten(2)
        x = add_gated(x, gate1, run_in_weight_dtype(self.self_attn_proj, attended))
        return add_gated(x, gate2, self.mlp(self.norm2(x).to(x.dtype)))


class IndividualTokenRefiner(nn.Module):
    """The refiner's blocks, under their name in the published checkpoints."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.refiner_blocks))


class TokenRefiner(nn.Module):
    """Turn states of the language model into text tokens, given the timestep."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(config.text_dim, config.dim)
        self.t_embedder = ScalarEmbedding(config.freq_dim, config.dim)
        sizes = (config.text_dim, config.dim, config.dim)
        self.c_embedder = TwoLayerMlp("linear_1 linear_2", sizes, in_float32=True)
        self.individual_token_refiner = IndividualTokenRefiner(config)

    def forward(
        self,
        text: Tensor,
        timesteps: Tensor,
        counts: Sequence[int] | None,
        dtype: torch.dtype,
        attention: AttentionChoice = SDPA,
    ) -> Tensor:
        """Return text tokens, B T C in `dtype`; rows of padding are undefined.

        Args:
            text: States of the language model, B T text_dim.
            timesteps: B, 0..1000.
            counts: Number of real tokens of each sample; None if all T are real.
            dtype: Dtype of the result.
            attention: Passed to `modules.attention.attend`.
        """
        vector = self.t_embedder(timesteps) + self.c_embedder(mean_text(text, counts))
        x = run_in_weight_dtype(self.input_embedder, text).to(dtype)
        blocks = self.individual_token_refiner.blocks
        return refine_tokens(x, blocks, vector, counts=counts, attention=attention)


def refine_tokens(
    x: Tensor,
    blocks: Iterable[nn.Module],
    vector: Tensor,
    counts: Sequence[int] | None,
    attention: AttentionChoice,
) -> Tensor:
    """Apply blocks to tokens B T C; `vector` is B C float32.

    `counts` has the number of real tokens of each sample; None if all T are real.
    """
    # an empty text keeps one key, because its rows need something to attend to
    lengths = None if counts is None else make_lengths([max(1, count) for count in counts], x.device)
    for block in blocks:
        x = block(x, vector, lengths, attention)
    return x


def mean_text(text: Tensor, counts: Sequence[int] | None) -> Tensor:
    """Return the mean of each text's states, B T D to B D float32, without padding; zeros for an empty text.

    `counts` has the number of real states of each text; None means that all are real.
    """
    if counts is None:
        return text.float().mean(dim=1)
    lengths = tensor_on(text.device, counts)
    real = torch.arange(text.shape[1], device=text.device) < lengths[:, None]  # B T
    return (text.float() * real[:, :, None]).sum(dim=1) / lengths.clamp(min=1)[:, None]


# modules of a token refiner: the list of its blocks, and the projection of the text's mean to a vector
HUNYUAN_REFINER = ("txt_in.individual_token_refiner.blocks", "txt_in.c_embedder")
FRAMEPACK_REFINER = (
    "context_embedder.token_refiner.refiner_blocks",
    "context_embedder.time_text_embed.text_embedder",
)


def scale_text_tokens(dit: nn.Module, refiner: tuple[str, str], llm: float, clip: float) -> None:
    """Scale the outputs of a transformer's token refiner from now on.

    Args:
        dit: The transformer.
        refiner: Paths of the refiner's list of blocks and of the layer that embeds the mean text vector.
        llm: Factor for the output of each refiner block. The blocks run one after another, so the factors
            multiply.
        clip: Factor for the mean text vector from which the gates are computed. Despite the option's name
            this vector comes from the language model, too; CLIP's does not pass through the refiner.
    """
    blocks, mean = map(dit.get_submodule, refiner)
    if llm != 1:
        for block in blocks.children():
            block.register_forward_hook(_make_scaling(llm))
    if clip != 1:
        mean.register_forward_hook(_make_scaling(clip))


def _make_scaling(factor: float) -> Callable[[nn.Module, tuple[object, ...], Tensor], Tensor]:
    def multiplied(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> Tensor:
        return output * factor

    return multiplied
