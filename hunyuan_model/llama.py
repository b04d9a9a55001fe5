"""A Llama 3 or Qwen 2.5 language model as a text encoder: turn prompts into one of its hidden states.

Only the layers before that state are built and loaded. Module names follow Hugging Face's files. Source:
Grattafiori et al. 2024, arXiv 2407.21783; Touvron et al. 2023, arXiv 2302.13971; Yang et al.
2024, arXiv 2412.15115, whose queries, keys and values have biases.
"""
# Letters: B prompts, L tokens, N heads, K heads of keys and values, D head width, C = model width

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_model.text_checkpoints import LLAMA, LanguageModel, LlamaConfig, read_llama
from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.devices import send_ahead


def rotate_halves(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate channel i together with channel i + D/2. x: B N L D. cosine, sine: L D, each angle twice."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def rotary_table(length: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position * theta^(-i/D) for even i, each L D float32, every angle twice."""
    # float32, to the last digit as in training: bf16 cannot tell positions above 256 apart
    frequencies = 1 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


class LlamaNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in the dtype of x.

    It rounds before the weight too, as in training and in the released pipelines, to the last bit of float16.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()  # the squares of float16 overflow
        return self.weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )


class LlamaAttention(nn.Module):
    """Causal attention; each head of keys and values serves N / K heads of queries."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        rows, key_rows = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        self.q_proj = nn.Linear(config.dim, rows, bias=config.has_bias)
        self.k_proj = nn.Linear(config.dim, key_rows, bias=config.has_bias)
        self.v_proj = nn.Linear(config.dim, key_rows, bias=config.has_bias)
        self.o_proj = nn.Linear(rows, config.dim, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, seen: Tensor) -> Tensor:
        """Attend among the tokens of a prompt. x: B L C. seen: B 1 L L, the keys each query attends to."""
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )  # q: B N L D    k, v: B K L D
        q, k = rotate_halves(q, cosine, sine), rotate_halves(k, cosine, sine)
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


class LlamaFeedForward(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """Attention and feed-forward, each applied to the normed stream and added to it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = LlamaNorm(config.dim, config.eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = LlamaNorm(config.dim, config.eps)
        self.mlp = LlamaFeedForward(config)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, seen: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The first layers of the model, and its final norm if the configuration says so."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_layers))
        self.norm = LlamaNorm(config.dim, config.eps) if config.final_norm else nn.Identity()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embed_tokens.weight.device

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the hidden state B L C. ids: B L, padded on the right. mask: B L, 1 for real tokens.

        States of padding are computed from the real tokens before them, as in the released pipeline.
        """
        length = ids.shape[1]
        x = self.embed_tokens(ids)
        cosine, sine = (
            send_ahead(part.to(x.dtype), x.device)
            for part in rotary_table(length, self.config.head_width, self.config.theta)
        )
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        seen = causal & mask.bool()[:, None, None, :]  # B 1 L L; the first token is real, so no row is empty
        for layer in self.layers:
            x = layer(x, cosine, sine, seen)
        return self.norm(x)


def load_llama(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    skip_layers: int,
    final_norm: bool,
    in_fp8: bool = False,
    model: LanguageModel = LLAMA,
) -> Llama:
    """Load the language model up to the state before its last `skip_layers` layers.

    fp8 weights are dequantized. in_fp8: keep the linear layers in 8 bits instead; an fp8 file's weights are
    then used as they are. model: which one it has to be.
    Raises CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_llama(checkpoint, skip_layers, final_norm, model)
        return load_planned(plan, Llama, device, dtype, f"the language model ({model.option})", in_fp8)
