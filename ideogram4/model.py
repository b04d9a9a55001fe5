"""The transformer of Ideogram 4: equal blocks over one stream of image and text.

Names of modules are those of the released files, with queries, keys and values in one layer. Source:
diffusers' `transformer_ideogram4.py`, which splits that layer. The embedding of time, modulation, norms and
angles of positions are always float32. The image comes first, then the text: attention depends on positions,
not on the order. `lumina.blocks` has the steps of a block.
"""
# Letters: B batch, L tokens of the image, T of the text, N heads, D head width, C = N * D

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ideogram4.configs import DIT, PAIR, Ideogram4Config
from lumina.blocks import FeedForward, GroupedAttention, Heads, JointTransformerBlock, LuminaTokens
from lumina.model import count_real_tokens
from modules.attention.attend import SecondText, make_lengths
from modules.devices import send_ahead
from modules.layers.half_rope import rotate_halves
from modules.layers.modulation import modulate
from modules.layers.norms import (
    Float32LayerNorm,
    RMSNorm,
    TwoLayerMlp,
    activation_dtype,
    run_float32,
    run_in_weight_dtype,
)
from modules.layers.rope import GridTable, cos_and_sin
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden, run_blocks

# position of the first row and column, so that images never share a position with texts
FIRST_IMAGE_POSITION = 65536
TIME_SCALE = 1e4  # factor on times of 0 to 1 before they are embedded
TEXT_EPS = 1e-6  # epsilon of the norm of the language model's states
TEXT_ROW, IMAGE_ROW = 0, 1  # rows of the embedding that tells text and image apart


class Ideogram4Layout(NamedTuple):
    """Image grid and length of the text, which determine the rotary embedding of a batch."""

    grid: tuple[int, int]  # rows, columns of image tokens
    num_text_tokens: int  # of the longest text


class Ideogram4Attention(GroupedAttention):
    """Self-attention of all tokens; positions rotate the halves of a head."""

    def __init__(self, config: Ideogram4Config) -> None:
        nn.Module.__init__(self)
        self.num_heads = self.num_kv_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.norm_q = RMSNorm(config.head_width, config.eps)
        self.norm_k = RMSNorm(config.head_width, config.eps)
        self.o = nn.Linear(config.dim, config.dim, bias=False)

    def heads(self, x: Tensor) -> Heads:
        """Return query, key and value heads of tokens B L C, each B L N D; q and k are normalized."""
        query, key, value = run_in_weight_dtype(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.norm_q(query), self.norm_k(key), value

    def rotate_heads(self, heads: Tensor, rotary: Tensor) -> Tensor:
        """Return heads of queries or keys, B L N D, with their positions."""
        return rotate_halves(heads, rotary)

    def project(self, attended: Tensor) -> Tensor:
        """Project the concatenated heads of attention, B L C, to the layer's output, B L C."""
        return run_in_weight_dtype(self.o, attended)


class Ideogram4Block(JointTransformerBlock):
    """Attention and feed-forward, each normalized before and after; `time` is already activated."""

    def __init__(self, config: Ideogram4Config) -> None:
        nn.Module.__init__(self)
        self.attention = Ideogram4Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(config.dim, config.eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.eps)
        self.attention_norm2 = RMSNorm(config.dim, config.eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.eps)
        self.adaln_modulation = nn.Linear(config.time_dim, 4 * config.dim)

    def modulation(self, time: Tensor) -> tuple[Tensor | None, ...]:
        """Return scale and gate for attention and for the feed-forward, each B 1 C float32."""
        rows = run_in_weight_dtype(self.adaln_modulation, time).float()
        scale1, gate1, scale2, gate2 = rows.unsqueeze(1).chunk(4, dim=-1)
        return scale1, gate1.tanh(), scale2, gate2.tanh()


class Ideogram4FinalLayer(nn.Module):
    """Final norm, scaled by the time, and projection to packed latents."""

    def __init__(self, config: Ideogram4Config) -> None:
        super().__init__()
        self.norm_final = Float32LayerNorm(config.dim, config.final_eps)  # has no weights
        self.linear = nn.Linear(config.dim, config.in_dim)
        self.adaln_modulation = nn.Linear(config.time_dim, config.dim)

    def forward(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        """Return packed latents, B L Z, of image tokens x, B L C."""
        # `time` is activated already: here it is activated once more
        scale = run_in_weight_dtype(self.adaln_modulation, functional.silu(tokens.time)).float().unsqueeze(1)
        return run_in_weight_dtype(self.linear, modulate(self.norm_final(x), None, scale, tokens.dtype))


class Ideogram4Model(BlockNetwork):
    """Predict the direction from noise to data of noisy latents, from states of Qwen3-VL.

    Simplified, without a second text and the code around the blocks:

        image = input_proj(noisy) + embed_image_indicator[1]                # B L C
        text = llm_cond_proj(llm_cond_norm(text)) + embed_image_indicator[0]    # B T C
        x = cat([image, text])                                              # B L+T C
        time = silu(adaln_proj(t_embedding(waves of 1e4 times)))            # B time_dim
        for block in layers:
            scale, gate, scale2, gate2 = block.adaln_modulation(time)       # each B 1 C, gates through tanh
            x = x + gate * attention_norm2(attention(attention_norm1(x) * (1 + scale)))
            x = x + gate2 * ffn_norm2(feed_forward(ffn_norm1(x) * (1 + scale2)))
        scale = final_layer.adaln_modulation(silu(time))
        direction = final_layer.linear(norm(x[:, :L]) * (1 + scale))        # B L Z, returned as B Z 1 H W

    With a second network of the same shape, `unconditional`, calls without a text run that one. Its blocks
    are numbered behind those of the first.
    """

    spec = DIT
    # LoRAs that only calls without a text use, each with the option that names it
    stage_files: Sequence[tuple[Path, str]] = ()
    compute_dtype_parameter = "layers.0.attention_norm1.weight"

    def __init__(
        self, config: Ideogram4Config, attention: AttentionChoice = SDPA, has_second: bool = False
    ) -> None:
        """Build the network without weights, and with `has_second` the one for calls without a text."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim = config.dim
        self.input_proj = nn.Linear(config.in_dim, dim)
        self.llm_cond_norm = RMSNorm(config.text_dim, TEXT_EPS)
        self.llm_cond_proj = nn.Linear(config.text_dim, dim)
        self.t_embedding = TwoLayerMlp("mlp_in mlp_out", (dim, dim, dim), in_float32=True)
        self.adaln_proj = nn.Linear(dim, config.time_dim)
        self.embed_image_indicator = nn.Embedding(2, dim)
        self.layers = nn.ModuleList(Ideogram4Block(config) for _ in range(config.num_layers))
        self.final_layer = Ideogram4FinalLayer(config)
        self.unconditional: Ideogram4Model | None = None
        if has_second:
            self.unconditional = Ideogram4Model(config, attention)
            self.spec = PAIR
        self._rotary = GridTable(self._make_table)

    def forward(self, *inputs: Any, overrides: Overrides = NO_OVERRIDES, **named_inputs: Any) -> Tensor:
        """Predict from the inputs of `embed`; without a text, with the second network if there is one.

        Args:
            inputs: Positional inputs of `embed`.
            overrides: Changes to this call.
            named_inputs: Inputs of `embed` by name.
        """
        second = self.unconditional
        if second is None:
            direction: Tensor = super().forward(*inputs, overrides=overrides, **named_inputs)
            return direction
        # blocks of the network that does not run are skipped; `overrides` count those of the one that runs
        num_layers = self.config.num_layers
        network, first, others = self, 0, range(num_layers, 2 * num_layers)
        if named_inputs.get("text") is None:
            network, first, others = second, num_layers, range(num_layers)
        skipped = frozenset(first + index for index in overrides.skip_blocks)
        without = frozenset(first + index for index in overrides.skip_self_attention)
        hidden = network.embed(*inputs, **{**named_inputs, "overrides": overrides})
        running = replace(overrides, skip_blocks=skipped.union(others), skip_self_attention=without)
        run_blocks(self, hidden, running)
        return network.unembed(hidden.x, hidden.tokens)

    def embed(
        self,
        noisy: Tensor,
        times: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Hidden:
        """Embed image and text as tokens, B L+T C; return them with the blocks' other inputs.

        Args:
            noisy: B Z 1 H W.
            times: B, 0 (noise) to 1 (image).
            text: States of the language model, B T text_dim; None: there is no text.
            text_mask: B T, true or 1 for real tokens, which come first; None without a text.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text` and `text_mask`, whose tokens follow the prompt's.

        Raises:
            ValueError: If sizes do not match.
        """
        channels, frames, *sides = noisy.shape[1:]
        if (channels, frames) != (self.config.in_dim, 1):
            raise ValueError(
                f"latents of {tuple(noisy.shape[1:])}: {self.config.in_dim} channels of one image"
            )
        grid = (sides[0], sides[1])
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        image = run_in_weight_dtype(self.input_proj, noisy.flatten(2).transpose(1, 2))
        image = (image + self.embed_image_indicator.weight[IMAGE_ROW]).to(dtype)
        time = self.embed_time(times)
        if text is None:
            return Hidden(image, self._make_tokens(grid, (0,), time, dtype))
        # of the prompt and, if `overrides` have one, of the second text
        prompts = overrides.text_inputs(len(noisy), text=text, text_mask=text_mask)
        texts, tokens = [], []
        for prompt in prompts:
            if prompt["text_mask"].shape != prompt["text"].shape[:2]:
                raise ValueError(
                    f"a text mask of {tuple(prompt['text_mask'].shape)} for text of "
                    f"{tuple(prompt['text'].shape)}"
                )
            longest, counts = count_real_tokens(prompt["text_mask"])
            texts.append(self._embed_text(prompt["text"][:, :longest], dtype))
            tokens.append(self._make_tokens(grid, counts, time, dtype))
        x = torch.cat([image, *texts], dim=1)
        if len(texts) == 1:
            return Hidden(x, tokens[0])
        assert overrides.combine_attention is not None  # a second text is always for NAG
        second = SecondText(
            num_image_tokens=image.shape[1],
            num_text_tokens=texts[1].shape[1],
            lengths=tokens[1].lengths,
            combine_attention=overrides.combine_attention,
        )
        return Hidden(x, replace(tokens[0], second_text=second, second_rotary=tokens[1].rotary))

    def _embed_text(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed states of the language model, B T text_dim, as tokens, B T C."""
        # caches have them in 16 or 8 bits, in which the norm would round once more
        text = run_in_weight_dtype(self.llm_cond_proj, self.llm_cond_norm(states.to(dtype)))
        return (text + self.embed_image_indicator.weight[TEXT_ROW]).to(dtype)

    def _make_tokens(
        self, grid: tuple[int, int], counts: tuple[int, ...], time: Tensor, dtype: torch.dtype
    ) -> LuminaTokens:
        """Return the blocks' inputs for an image and texts of `counts` tokens, one number a sample."""
        lengths = None  # with equal lengths no token needs a mask
        if len(set(counts)) > 1:
            lengths = make_lengths([grid[0] * grid[1] + count for count in counts], time.device)
        return LuminaTokens(
            grid,
            rotary=self._rotary.get_table(Ideogram4Layout(grid, max(counts)), time.device),
            lengths=lengths,
            time=time,
            dtype=dtype,
            attention=self.attention,
        )

    def embed_time(self, times: Tensor) -> Tensor:
        """Return the activated embedding of times, B to B time_dim float32."""
        half = self.config.dim // 2
        # Sines before cosines; the lowest frequency is 1e-4, so the steps between them are half - 1. In
        # float32 as trained: times count to 1e4, so a frequency's last digit moves an angle by a thousandth.
        exponents = torch.arange(half, dtype=torch.float32, device=times.device)
        frequencies = torch.exp(exponents * -(math.log(1e4) / (half - 1)))
        angles = torch.outer(TIME_SCALE * times.float(), frequencies)
        embedded = self.t_embedding(torch.cat([angles.sin(), angles.cos()], dim=1))
        return functional.silu(run_float32(self.adaln_proj, embedded))

    def unembed(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        """Turn tokens B L+T C into the direction from noise to data, B Z 1 H W in float32."""
        latents = self.final_layer(x[:, : tokens.image], tokens).float()
        return latents.transpose(1, 2).unflatten(2, (1, *tokens.grid))

    def _make_table(self, layout: Ideogram4Layout, /, *, device: torch.device) -> Tensor:
        """Return (cosine, sine) pairs of the angles of image and text, L+T 1 D/2 2 float32."""
        # A text's token j is at (j, j, j), an image's token at (first, first + row, first + column) of the
        # axes time, row and column. Of the frequencies, numbers 1, 4, 7, ... encode rows and 2, 5, 8, ...
        # columns; the others, and those behind the sections of rows and columns, encode the time.
        rows, columns = layout.grid
        text = torch.arange(layout.num_text_tokens, dtype=torch.float32)
        row = torch.arange(rows, dtype=torch.float32).repeat_interleave(columns)
        column = torch.arange(columns, dtype=torch.float32).repeat(rows)
        image = torch.stack([torch.zeros_like(row), row, column], dim=1) + FIRST_IMAGE_POSITION
        positions = torch.cat([image, text[:, None].expand(-1, 3)])  # L+T 3
        width, section = self.config.head_width, self.config.section
        axes = torch.zeros(width // 2, dtype=torch.long)
        axes[1 : 3 * section : 3] = 1
        axes[2 : 3 * section : 3] = 2
        # float32 as trained: at position 65536, an exact angle differs in the third digit
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        angles = positions[:, axes] * (1.0 / self.config.rope_theta**exponents)
        return send_ahead(cos_and_sin(angles), device).unsqueeze(1)


class NetworkPair(nn.Module):
    """Two networks: calls with a text run the first, those without one the second."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        """Join two networks, which keep their weights and how they run."""
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, *inputs: Any, **named_inputs: Any) -> Tensor:
        """Predict from the inputs of a network's `forward`."""
        network = self.second if named_inputs.get("text") is None else self.first
        direction: Tensor = network(*inputs, **named_inputs)
        return direction
