"""The transformer of ERNIE-Image: equal blocks over one stream of image and text, with one modulation.

Names of modules are the released ones, which are those of diffusers. Source: diffusers'
`transformer_ernie_image.py`. The embedding of time, modulation, norms and angles of positions are always
float32. The image comes first, then the text; the release has the same order.
"""
# Letters: B batch, L tokens of the image, T of text, N heads, D head width, C = N * D

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ernie_image.configs import DIT, ErnieImageConfig
from lumina.blocks import GroupedAttention, Heads, LuminaTokens
from lumina.model import TokenLayout, count_real_tokens
from modules.attention.attend import SecondText, make_lengths
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import (
    Float32LayerNorm,
    RMSNorm,
    TwoLayerMlp,
    activation_dtype,
    run_float32,
    run_in_weight_dtype,
)
from modules.layers.rope import GridTable, axis_rotations, sinusoid, spread_over_grid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden

MODULATION_ROWS = 6  # that modulate all blocks: shift, scale and gate of attention, then of feed-forward
END_MODULATION_ROWS = 2  # that modulate the final norm: scale, then shift, unlike in the blocks


def mix_halves(x: Tensor, table: Tensor) -> Tensor:
    """Mix the halves of each head of x, B L N D, by the angles of positions.

    The model was trained with this in place of a rotation. A rotation turns the pair of channels (j, j + D/2)
    by one angle. Here, the two channels have angles of their own, `a` and `b`:

        (first, second) -> (first cos a - second sin a, second cos b + first sin b)

    So lengths are not kept and no kernel for rotary embedding computes the same.

    Args:
        x: Queries or keys, B L N D.
        table: Cosines and sines of all D angles, L 1 D 2 or B L 1 D 2 float32.

    Returns:
        The mixed heads, computed in float32 and rounded to the dtype of x.
    """
    cosine, sine = table.unbind(-1)
    first, second = x.type_as(table).chunk(2, dim=-1)
    return (torch.cat([first, second], dim=-1) * cosine + torch.cat([-second, first], dim=-1) * sine).type_as(
        x
    )


@dataclass(frozen=True)
class ErnieImageTokens(LuminaTokens):
    """Inputs of the blocks besides x, B L+T C; `time`, B 8 C, is six block rows and two final rows.

    `rotary` contains cosines and sines of D angles, see `mix_halves`: L+T 1 D 2, or B L+T 1 D 2.
    """


class ErnieImageAttention(GroupedAttention):
    """Self-attention of all tokens, with positions that `mix_halves` applies."""

    def __init__(self, config: ErnieImageConfig) -> None:
        nn.Module.__init__(self)
        dim = config.dim
        self.head_width = config.head_width
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.norm_q = RMSNorm(config.head_width, config.eps)
        self.norm_k = RMSNorm(config.head_width, config.eps)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])

    def heads(self, x: Tensor) -> Heads:
        """Return query, key and value heads of tokens B L C, each B L N D; q and k are normalized."""
        query, key, value = (
            run_in_weight_dtype(layer, x).unflatten(-1, (-1, self.head_width))
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.norm_q(query), self.norm_k(key), value

    def rotate_heads(self, heads: Tensor, rotary: Tensor) -> Tensor:
        """Return heads of queries or keys, B L N D, with their positions."""
        return mix_halves(heads, rotary)

    def project(self, attended: Tensor) -> Tensor:
        """Project the concatenated heads of attention, B L C, to the layer's output, B L C."""
        return run_in_weight_dtype(self.to_out[0], attended)


class ErnieImageFeedForward(nn.Module):
    """Gated feed-forward: linear_fc2(up_proj(x) * gelu(gate_proj(x))), with the exact GELU."""

    def __init__(self, config: ErnieImageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.linear_fc2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to x, B L C."""
        gates = functional.gelu(run_in_weight_dtype(self.gate_proj, x))
        return run_in_weight_dtype(self.linear_fc2, run_in_weight_dtype(self.up_proj, x) * gates)


class ErnieImageBlock(nn.Module):
    """Attention and feed-forward, each behind a norm; the modulation is that of all blocks."""

    def __init__(self, config: ErnieImageConfig) -> None:
        super().__init__()
        self.adaLN_sa_ln = RMSNorm(config.dim, config.eps)
        self.self_attention = ErnieImageAttention(config)
        self.adaLN_mlp_ln = RMSNorm(config.dim, config.eps)
        self.mlp = ErnieImageFeedForward(config)

    def forward(self, x: Tensor, tokens: ErnieImageTokens) -> Tensor:
        """Apply the block to tokens x, B L+T C."""
        shift, scale, gate, *feed_rows = tokens.time[:, :MODULATION_ROWS, None].unbind(1)  # each B 1 C
        h = modulate(self.adaLN_sa_ln(x), shift, scale, tokens.dtype)
        x = add_gated(x, gate, self.self_attention(h, tokens))
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        return self.feed(x, tokens.dtype, *feed_rows)

    def modulated_input(self, x: Tensor, tokens: ErnieImageTokens) -> Tensor:
        """Return the modulated input of attention for the image tokens of x, B L+T C to B L C."""
        shift, scale = tokens.time[:, :2, None].unbind(1)
        return modulate(self.adaLN_sa_ln(x[:, : tokens.image]), shift, scale, tokens.dtype)

    def feed(self, x: Tensor, dtype: torch.dtype, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Add the feed-forward branch to x, B L C; each token is processed independently."""
        return add_gated(x, gate, self.mlp(modulate(self.adaLN_mlp_ln(x), shift, scale, dtype)))


class ErnieImageFinalNorm(nn.Module):
    """Norm of the image tokens; `linear` computes its scale and shift from the embedded time itself."""

    def __init__(self, config: ErnieImageConfig) -> None:
        super().__init__()
        self.norm = Float32LayerNorm(config.dim, config.eps)  # has no weights
        self.linear = nn.Linear(config.dim, END_MODULATION_ROWS * config.dim)

    def forward(self, x: Tensor, tokens: ErnieImageTokens) -> Tensor:
        """Return normalized and modulated image tokens, B L C."""
        scale, shift = tokens.time[:, MODULATION_ROWS:, None].unbind(1)
        return modulate(self.norm(x), shift, scale, tokens.dtype)


class ErnieImageModel(BlockNetwork):
    """Predict the velocity of noisy latents of an image from states of Ministral 3.

    Simplified, without a second text and the code around the blocks:

        x = cat([x_embedder.proj(noisy), text_proj(text)])                      # B L+T C
        time = time_embedding(sinusoid(timesteps))                              # B C
        shift, scale, gate, shift2, scale2, gate2 = adaLN_modulation(silu(time))    # of all blocks, B 1 C
        for block in layers:
            x = x + gate * self_attention(adaLN_sa_ln(x) * (1 + scale) + shift)
            h = adaLN_mlp_ln(x) * (1 + scale2) + shift2
            x = x + gate2 * linear_fc2(up_proj(h) * gelu(gate_proj(h)))
        scale, shift = final_norm.linear(time)                                  # no SiLU before it
        velocity = final_linear(norm(x[:, :L]) * (1 + scale) + shift)           # B L Z, returned as B Z 1 H W
    """

    spec = DIT
    compute_dtype_parameter = "layers.0.adaLN_sa_ln.weight"

    def __init__(self, config: ErnieImageConfig, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights; the blocks share one modulation, computed from the timestep."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim = config.dim
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.channels, dim, 1)})
        self.text_proj = nn.Linear(config.text_dim, dim, bias=False)
        self.time_embedding = TwoLayerMlp("linear_1 linear_2", (dim, dim, dim), in_float32=True)
        # Identity stands for the activation, so that the layer keeps its number in the file
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(dim, MODULATION_ROWS * dim))
        self.layers = nn.ModuleList(ErnieImageBlock(config) for _ in range(config.num_layers))
        self.final_norm = ErnieImageFinalNorm(config)
        self.final_linear = nn.Linear(dim, config.channels)
        self._rotary = GridTable[TokenLayout](self._make_table)

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Hidden:
        """Embed image and text as tokens, B L+T C; return them with the blocks' other inputs.

        Args:
            noisy: B Z 1 H W.
            timesteps: B, 0..1000.
            text: States of the language model, B T text_dim.
            text_mask: B T, true or 1 for real tokens, which come first.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text` and `text_mask`, whose tokens follow the prompt's.

        Raises:
            ValueError: If sizes do not match.
        """
        channels, frames, *sides = noisy.shape[1:]
        if (channels, frames) != (self.config.channels, 1):
            raise ValueError(
                f"latents of {tuple(noisy.shape[1:])}: {self.config.channels} channels of one image"
            )
        if text_mask.shape != text.shape[:2]:
            raise ValueError(f"a text mask of {tuple(text_mask.shape)} for text of {tuple(text.shape)}")
        grid = (sides[0], sides[1])
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        image = run_in_weight_dtype(self.x_embedder["proj"], noisy.squeeze(2)).flatten(2).transpose(1, 2)
        time = self.embed_time(timesteps)
        # of the prompt and, if `overrides` have one, of the second text
        prompts = overrides.text_inputs(len(noisy), text=text, text_mask=text_mask)
        texts, inputs = [], []
        for prompt in prompts:
            longest, counts = count_real_tokens(prompt["text_mask"])
            states = prompt["text"][:, :longest]
            texts.append(run_in_weight_dtype(self.text_proj, states).to(dtype))
            inputs.append(self._make_tokens(grid, counts, time, dtype))
        x = torch.cat([image.to(dtype), *texts], dim=1)
        if len(texts) == 1:
            return Hidden(x, inputs[0])
        assert overrides.combine_attention is not None  # a second text is always for NAG
        second = SecondText(
            num_image_tokens=image.shape[1],
            num_text_tokens=texts[1].shape[1],
            lengths=inputs[1].lengths,
            combine_attention=overrides.combine_attention,
        )
        return Hidden(x, replace(inputs[0], second_text=second, second_rotary=inputs[1].rotary))

    def _make_tokens(
        self, grid: tuple[int, int], counts: tuple[int, ...], time: Tensor, dtype: torch.dtype
    ) -> ErnieImageTokens:
        """Return the blocks' inputs for an image and texts of `counts` tokens, one number a sample."""
        has_equal_lengths = len(set(counts)) == 1
        lengths = None  # with equal lengths no token needs a mask
        if not has_equal_lengths:
            lengths = make_lengths([grid[0] * grid[1] + count for count in counts], time.device)
        layout = TokenLayout(grid, captions=counts[:1] if has_equal_lengths else counts, longest=max(counts))
        return ErnieImageTokens(
            grid,
            rotary=self._rotary.get_table(layout, time.device),
            lengths=lengths,
            time=time,
            dtype=dtype,
            attention=self.attention,
        )

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Return the modulation for all blocks, then for the final norm, B to B 8 C float32."""
        # the model has sines before cosines
        cosines, sines = sinusoid(timesteps, self.config.dim, torch.float32).chunk(2, dim=1)
        time = self.time_embedding(torch.cat([sines, cosines], dim=1))
        rows = run_float32(self.adaLN_modulation[1], functional.silu(time))
        end_rows = run_float32(self.final_norm.linear, time)
        return torch.cat(
            [rows.unflatten(1, (MODULATION_ROWS, -1)), end_rows.unflatten(1, (END_MODULATION_ROWS, -1))],
            dim=1,
        )

    def unembed(self, x: Tensor, tokens: ErnieImageTokens) -> Tensor:
        """Turn tokens B L+T C into the velocity, B Z 1 H W in float32."""
        h = self.final_norm(x[:, : tokens.image], tokens)
        pixels = run_in_weight_dtype(self.final_linear, h).float()
        return pixels.transpose(1, 2).unflatten(2, (1, *tokens.grid))

    def _make_table(self, layout: TokenLayout, /, *, device: torch.device) -> Tensor:
        """Return cosines and sines of the angles of image and text, L+T 1 D 2 float32, or B L+T 1 D 2."""
        # A text's token j is at (j, 0, 0), an image's token at (number of the text's real tokens, row,
        # column). Only the image's first coordinate differs between samples.
        rows, columns = layout.grid
        text = self._make_grid_table((range(layout.longest), (0,), (0,)), device)
        tables = []
        for count in layout.captions:
            image = self._make_grid_table(((count,), range(rows), range(columns)), device)
            tables.append(torch.cat([image, text]))
        table = tables[0] if len(tables) == 1 else torch.stack(tables)
        # Each angle stands twice, next to itself, in a row of D angles. The added axis is for heads.
        return table.repeat_interleave(2, dim=-2).unsqueeze(-3)

    def _make_grid_table(self, positions: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """Return cosines and sines, n D/2 2, of a grid's positions along its three axes."""
        pairs = [
            # float32 angles, as trained
            axis_rotations(torch.tensor(axis, dtype=torch.float32), width, self.config.rope_theta, device)
            for axis, width in zip(positions, self.config.rotary_widths, strict=True)
        ]
        return spread_over_grid(pairs)
