"""The adapter of Anima: T5's tokens, embedded by its own table, attend to the states of Qwen3.

Its output replaces T5's states, on which Cosmos-Predict2 was trained. It is in the transformer's file, or in
a separate one. Source: the released model, and diffusers' AnimaTextConditioner.
"""
# Letters: T tokens of T5, S states of the language model, N heads, D head width, C = N * D

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from anima.configs import AdapterConfig
from modules.attention.attend import attend
from modules.devices import send_ahead
from modules.layers.half_rope import rotate_halves
from modules.layers.norms import RMSNorm, activation_dtype, run_in_weight_dtype
from modules.layers.rope import GridTable, TokenGrid, bind_rotary_table, rotary_table
from modules.speed_options import AttentionChoice


class AdapterAttention(nn.Module):
    """Attention of T5 tokens to themselves or to text states, with normalized, rotated queries and keys."""

    def __init__(self, config: AdapterConfig, source_dim: int) -> None:
        super().__init__()
        width = config.dim // config.num_heads
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = RMSNorm(width, config.eps)
        self.k_proj = nn.Linear(source_dim, config.dim, bias=False)
        self.k_norm = RMSNorm(width, config.eps)
        self.v_proj = nn.Linear(source_dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, source: Tensor, rotary: Tensor, source_rotary: Tensor, attention: AttentionChoice
    ) -> Tensor:
        """Return the attention of x, 1 T C, to `source`, 1 S C; rotary positions of both start at 0."""
        # x: 1 T C    source: 1 T C or 1 S text_dim, whose rows have their own positions, from 0
        heads = (-1, *self.q_norm.normalized_shape)
        query = self.q_norm(run_in_weight_dtype(self.q_proj, x).unflatten(-1, heads))
        key = self.k_norm(run_in_weight_dtype(self.k_proj, source).unflatten(-1, heads))
        value = run_in_weight_dtype(self.v_proj, source).unflatten(-1, heads)
        attended = attend(rotate_halves(query, rotary), rotate_halves(key, source_rotary), value, attention)
        return run_in_weight_dtype(self.o_proj, attended.flatten(2))


class AdapterBlock(nn.Module):
    """Self-attention, cross-attention to the text encoder's states, and feed-forward, each pre-normed."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.norm_self_attn = RMSNorm(config.dim, config.eps)
        self.self_attn = AdapterAttention(config, config.dim)
        self.norm_cross_attn = RMSNorm(config.dim, config.eps)
        self.cross_attn = AdapterAttention(config, config.text_dim)
        self.norm_mlp = RMSNorm(config.dim, config.eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self, x: Tensor, states: Tensor, rotary: Tensor, states_rotary: Tensor, attention: AttentionChoice
    ) -> Tensor:
        """Apply the block to tokens x, 1 T C. `states` are 1 S text_dim."""
        # x: 1 T C    states: 1 S text_dim
        normed = self.norm_self_attn(x)
        x = x + self.self_attn(normed, normed, rotary, rotary, attention)
        x = x + self.cross_attn(self.norm_cross_attn(x), states, rotary, states_rotary, attention)
        first, gelu, second = self.mlp
        return x + run_in_weight_dtype(second, gelu(run_in_weight_dtype(first, self.norm_mlp(x))))


class AnimaAdapter(nn.Module):
    """Adapter from T5 tokens and Qwen3 hidden states to the transformer's text tokens."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(AdapterBlock(config) for _ in range(config.num_layers))
        self.out_proj = nn.Linear(config.dim, config.dim)
        self.norm = RMSNorm(config.dim, config.eps)
        widths = (config.dim // config.num_heads,)
        make_table = bind_rotary_table(rotary_table, widths, config.rope_theta)
        self._rotary, self._states_rotary = GridTable(make_table), GridTable(make_table)

    def forward(self, states: Tensor, ids: Tensor, attention: AttentionChoice) -> Tensor:
        """Convert one prompt's T5 tokens and Qwen3 states to text tokens, 1 T C, without padding or masks.

        Args:
            states: States of the prompt's own tokens, 1 S text_dim. With S = 0, a state of zeros is used, so
                that cross-attention adds nothing.
            ids: T5's tokens with its end token, 1 T; copied to the device of the states.
            attention: Passed to `modules.attention.attend`.
        """
        dtype = activation_dtype(states.device, self.out_proj.weight.dtype)
        states = states.to(dtype)
        if not states.shape[1]:
            states = functional.pad(states, (0, 0, 0, 1))
        rotary = self._rotary.get_table(TokenGrid((ids.shape[1],)), states.device)
        states_rotary = self._states_rotary.get_table(TokenGrid((states.shape[1],)), states.device)
        x = self.embed(send_ahead(ids, states.device)).to(dtype)
        for block in self.blocks:
            x = block(x, states, rotary, states_rotary, attention)
        return self.norm(run_in_weight_dtype(self.out_proj, x))


def embed_prompts(
    adapter: AnimaAdapter,
    states: Tensor,
    counts: list[int],
    ids: Tensor,
    weights: Tensor,
    max_tokens: int,
    attention: AttentionChoice,
) -> list[Tensor]:
    """Return each prompt's token embeddings from the LLM adapter, times the tokens' weights: n C each.

    Args:
        adapter: The adapter.
        states: States of the language model, B S text_dim.
        counts: Number of real states in each prompt; padding follows them.
        ids: T5's token ids, B T; on the host if possible.
        weights: B T: 0 for padding, else the token's weight, which is 1 for the last token; on the host if
            possible.
        max_tokens: Maximum number of tokens n of a prompt.
        attention: How attention is computed.
    """
    positions = torch.arange(1, ids.shape[1] + 1, device=weights.device)
    # number of tokens up to the last one with a weight: weights in between may be 0
    ends = ((weights != 0) * positions).amax(dim=1).tolist()
    embedded = []
    for sample, (count, end) in enumerate(zip(counts, ends, strict=True)):
        length = min(max(end, 1), max_tokens)
        prompt = adapter(states[sample : sample + 1, :count], ids[sample : sample + 1, :length], attention)
        token_weights = weights[sample, :length, None].to(prompt.dtype)
        embedded.append(prompt[0] * send_ahead(token_weights, prompt.device))
    return embedded
