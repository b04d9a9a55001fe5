"""The transformer of Anima: Cosmos-Predict2's for images, which attends to the rows of Anima's adapter.

Module names follow the published checkpoint. Source: the released model, NVIDIA 2025 (Cosmos-Predict2), and
diffusers' CosmosTransformer3DModel. The embedding of time, modulation, norms and rotary angles are always
float32. Everything else computes in the dtype of its weights or of autocast; if that is float16, the residual
stream is float32.
"""
# Letters: B batch, L image tokens, T rows of text, N heads, D head width, C = N * D

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from anima.adapter import AnimaAdapter, embed_prompts
from anima.configs import DIT, PATCH, TEXT_ROWS, AnimaConfig
from modules.attention.attend import attend
from modules.layers.half_rope import rotate_halves
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import Float32LayerNorm, RMSNorm, TwoLayerMlp, activation_dtype, run_in_weight_dtype
from modules.layers.rope import (
    GridTable,
    axis_rotations,
    select_rotations,
    sinusoid,
    spread_over_grid,
)
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.offload.context import TokenShard
from runtime.run_blocks import BlockNetwork, Hidden
from wan.spec import pad_texts


@dataclass(frozen=True)
class AnimaTokens:
    """Inputs of the blocks besides the image tokens x, B L C; built once per forward pass."""

    grid: tuple[int, int]  # image tokens along rows, columns; L is their product
    rotary: Tensor  # turns by position, L 1 D/2 2, or B L 1 D/2 2
    # B T C each, usually one; and T float32: how many equal rows each row stands for, None: one each
    text_tokens: tuple[tuple[Tensor, Tensor | None], ...]
    time: Tensor  # B C float32, after its activation
    shifts: Tensor  # B 3C float32, added to the shift, scale and gate of every branch
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    # merges the attentions to two texts, B L N D each; None: there is one text
    combine_attention: Callable[..., Tensor] | None
    shard: TokenShard | None = None  # the tokens that this process has; None: all

    def cut(self, shard: TokenShard) -> Self:
        """Return a copy of the inputs for one process's share of the tokens."""
        return replace(self, rotary=shard.slice_rotary(self.rotary), shard=shard)

    @property
    def first_noisy_token(self) -> int:
        """Return the index of the first token of the noisy latents; their tokens form `grid`."""
        return 0

    def select(self, kept: Tensor, num_left_out: int) -> Self:
        """Return the block inputs for a subset of the tokens in x.

        `kept` contains the ascending indices of these tokens, B K.
        """
        return replace(self, rotary=select_rotations(self.rotary, kept, num_left_out))


class BranchModulation(NamedTuple):
    """Shift, scale and gate of one of a block's branches, each B 1 C float32."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class AnimaAttention(nn.Module):
    """Self-attention of image tokens, or cross-attention to text, with normalized queries and keys."""

    def __init__(self, config: AnimaConfig, source_dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_width, config.eps)
        self.k_proj = nn.Linear(source_dim, config.dim, bias=False)
        self.k_norm = RMSNorm(config.head_width, config.eps)
        self.v_proj = nn.Linear(source_dim, config.dim, bias=False)
        self.output_proj = nn.Linear(config.dim, config.dim, bias=False)

    def query(self, x: Tensor) -> Tensor:
        """Return the normalized queries of tokens, B L N D."""
        heads = (-1, *self.q_norm.normalized_shape)
        return self.q_norm(run_in_weight_dtype(self.q_proj, x).unflatten(-1, heads))

    def key_and_value(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Project `source`, B S source_dim, to normalized keys and to values, each B S N D."""
        heads = (-1, *self.k_norm.normalized_shape)
        key = self.k_norm(run_in_weight_dtype(self.k_proj, source).unflatten(-1, heads))
        return key, run_in_weight_dtype(self.v_proj, source).unflatten(-1, heads)

    def attend_image(self, x: Tensor, tokens: AnimaTokens) -> Tensor:
        """Return the self-attention of image tokens, B L C, with rotary position embedding."""
        key, value = self.key_and_value(x)
        query = rotate_halves(self.query(x), tokens.rotary)
        key = rotate_halves(key, tokens.rotary)
        shard = tokens.shard
        if shard is not None:
            query, key, value = shard.gather_tokens(query, key, value)
        attended = attend(query, key, value, tokens.attention)
        if shard is not None:
            attended = shard.gather_heads(attended)
        return run_in_weight_dtype(self.output_proj, attended.flatten(2))

    def attend_text(self, x: Tensor, tokens: AnimaTokens) -> Tensor:
        """Return the cross-attention, B L C, of image tokens to all text tokens, including zero padding."""
        query = self.query(x)
        attended_by_text = []
        for text, repeats in tokens.text_tokens:
            key, value = self.key_and_value(text)
            attended_by_text.append(attend(query, key, value, tokens.attention, repeats=repeats))
        attended = attended_by_text[0]
        if tokens.combine_attention is not None:
            attended = tokens.combine_attention(*attended_by_text)
        return run_in_weight_dtype(self.output_proj, attended.flatten(2))


class AnimaFeedForward(nn.Module):
    """Feed-forward network: two linear layers with exact GELU between them."""

    def __init__(self, config: AnimaConfig) -> None:
        super().__init__()
        self.layer1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.layer2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to x, B L C."""
        return run_in_weight_dtype(self.layer2, functional.gelu(run_in_weight_dtype(self.layer1, x)))


def make_modulation(config: AnimaConfig, num_vectors: int) -> nn.Sequential:
    """Return the layers from `AnimaTokens.time`, to which SiLU has been applied, to modulation vectors."""
    return nn.Sequential(
        nn.Identity(),
        nn.Linear(config.dim, config.modulation_dim, bias=False),
        nn.Linear(config.modulation_dim, num_vectors * config.dim, bias=False),
    )


def compute_modulation(layers: nn.Module, time: Tensor) -> Tensor:
    """Compute modulation vectors, B n*C float32, from time, B C, with layers of `make_modulation`."""
    _, first, second = layers.children()
    return run_in_weight_dtype(second, run_in_weight_dtype(first, time)).float()


class AnimaBlock(nn.Module):
    """Self-attention, cross-attention to text and feed-forward, each modulated by the timestep."""

    def __init__(self, config: AnimaConfig) -> None:
        super().__init__()
        self.norm = Float32LayerNorm(config.dim, config.eps)  # without weights: one serves all branches
        self.self_attn = AnimaAttention(config, config.dim)
        self.cross_attn = AnimaAttention(config, config.context_dim)
        self.mlp = AnimaFeedForward(config)
        self.adaln_modulation_self_attn = make_modulation(config, 3)
        self.adaln_modulation_cross_attn = make_modulation(config, 3)
        self.adaln_modulation_mlp = make_modulation(config, 3)

    def forward(self, x: Tensor, tokens: AnimaTokens) -> Tensor:
        """Apply the block to image tokens x, B L C."""
        branch = self.modulation(self.adaln_modulation_self_attn, tokens)
        h = modulate(self.norm(x), branch.shift, branch.scale, tokens.dtype)
        x = add_gated(x, branch.gate, self.self_attn.attend_image(h, tokens))
        branch = self.modulation(self.adaln_modulation_cross_attn, tokens)
        h = modulate(self.norm(x), branch.shift, branch.scale, tokens.dtype)
        x = add_gated(x, branch.gate, self.cross_attn.attend_text(h, tokens))
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        return self.feed(x, tokens.dtype, *self.modulation(self.adaln_modulation_mlp, tokens))

    def modulation(self, layers: nn.Module, tokens: AnimaTokens) -> BranchModulation:
        """Return the shift, scale and gate of one of the block's branches."""
        vectors = compute_modulation(layers, tokens.time) + tokens.shifts
        return BranchModulation(*vectors.unsqueeze(1).chunk(3, dim=-1))

    def modulated_input(self, x: Tensor, tokens: AnimaTokens) -> Tensor:
        """Return the modulated input of the block's self-attention, B L C, for the block input x, B L C."""
        branch = self.modulation(self.adaln_modulation_self_attn, tokens)
        return modulate(self.norm(x), branch.shift, branch.scale, tokens.dtype)

    def feed(self, x: Tensor, dtype: torch.dtype, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Add the feed-forward branch to x, B L C; tokens are processed independently."""
        return add_gated(x, gate, self.mlp(modulate(self.norm(x), shift, scale, dtype)))


class AnimaFinalLayer(nn.Module):
    """Final norm, modulated by the timestep's shift and scale, and projection to patches."""

    def __init__(self, config: AnimaConfig) -> None:
        super().__init__()
        self.norm = Float32LayerNorm(config.dim, config.eps)
        self.linear = nn.Linear(config.dim, config.channels * PATCH**2, bias=False)
        self.adaln_modulation = make_modulation(config, 2)

    def forward(self, x: Tensor, tokens: AnimaTokens) -> Tensor:
        """Return the patches of the velocity for image tokens x, B L C."""
        vectors = compute_modulation(self.adaln_modulation, tokens.time)
        # `shifts` are for shift, scale and gate; this layer has no gate
        vectors = vectors + tokens.shifts[:, : vectors.shape[1]]
        shift, scale = vectors.unsqueeze(1).chunk(2, dim=-1)
        return run_in_weight_dtype(self.linear, modulate(self.norm(x), shift, scale, tokens.dtype))


class AnimaModel(BlockNetwork):
    """Predict the velocity of noisy latents of an image from T5's tokens and Qwen3's states.

    Simplified, without a second text and the code around the blocks:

        text = llm_adapter(states, ids), zeros up to 512 rows                 # B T context_dim
        image = x_embedder(patches of noisy)                                # B L C
        waves = sinusoid(sigmas)                                              # B C
        shifts = t_embedder(waves)                                            # B 3C
        time = t_embedding_norm(waves)                                        # B C
        for block in blocks:
            for f in self_attn, cross_attn to text, mlp:
                shift, scale, gate = its adaln_modulation(time) + shifts
                image = image + gate * f(norm(image) * (1 + scale) + shift)
        velocity = final_layer(image, time, shifts)           # B L 4*Z, returned as B Z 1 H W
    """

    spec = DIT
    compute_dtype_parameter = "blocks.0.self_attn.q_norm.weight"

    def __init__(self, config: AnimaConfig, attention: AttentionChoice = SDPA) -> None:
        """Build the network, with its adapter to the language model, without weights."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim = config.dim
        assert config.adapter is not None  # `anima.files` rejects a file without it
        # a channel more than the latents have, for a mask of padding, which is 0 everywhere
        columns = (config.channels + 1) * PATCH**2
        # the Identity and index 1 reproduce the names in the file
        proj = nn.ModuleList([nn.Identity(), nn.Linear(columns, dim, bias=False)])
        self.x_embedder = nn.ModuleDict({"proj": proj})
        layers = TwoLayerMlp("linear_1 linear_2", (dim, dim, 3 * dim), bias=False, in_float32=True)
        self.t_embedder = nn.ModuleList([nn.Identity(), layers])
        self.t_embedding_norm = RMSNorm(dim, config.eps)
        self.blocks = nn.ModuleList(AnimaBlock(config) for _ in range(config.num_layers))
        self.final_layer = AnimaFinalLayer(config)
        self.llm_adapter = AnimaAdapter(config.adapter)
        self._rotary = GridTable[tuple[int, int]](self._make_table)

    def embed(
        self,
        noisy: Tensor,
        sigmas: Tensor,
        states: Tensor,
        states_mask: Tensor,
        ids: Tensor,
        weights: Tensor,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Hidden:
        """Embed a noisy image as tokens, B L C; return them with the blocks' other inputs, such as text.

        Args:
            noisy: B Z 1 H W.
            sigmas: B, 0..1, as the model takes them.
            states: States of the language model, B S text_dim.
            states_mask: B S, 1 for real ones, which come first.
            ids: Token ids of T5, B T'.
            weights: B T', 0 for padding after the tokens, 1 or a weight for each token.
            overrides: Changes to this call; a second text in them (for NAG) has its own
                `states`, `states_mask`, `ids` and `weights`.

        Raises:
            ValueError: If sizes do not match.
        """
        self._check_sizes(noisy)
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        grid = (noisy.shape[-2] // PATCH, noisy.shape[-1] // PATCH)
        patches = cut_patches(noisy)
        # the model also takes a padding mask, all 0, as the last channels of each patch
        patches = functional.pad(patches, (0, PATCH**2))
        waves = sinusoid(sigmas, self.config.dim, torch.float32)
        time = self.t_embedding_norm(waves)
        prompts = overrides.text_inputs(
            len(noisy), states=states, states_mask=states_mask, ids=ids, weights=weights
        )
        tokens = AnimaTokens(
            grid,
            rotary=self._rotary.get_table(grid, noisy.device),
            text_tokens=tuple(self._embed_prompt(dtype, **prompt) for prompt in prompts),
            time=functional.silu(time.float()),
            shifts=self.t_embedder[1](waves),
            dtype=dtype,
            attention=self.attention,
            combine_attention=overrides.combine_attention,
        )
        # the residual stream of the released weights leaves float16's range (ComfyUI, pull request 12249)
        stream_dtype = torch.float32 if dtype == torch.float16 else dtype
        image = run_in_weight_dtype(self.x_embedder.get_submodule("proj.1"), patches).to(stream_dtype)
        return Hidden(image, tokens)

    def _check_sizes(self, noisy: Tensor) -> None:
        if noisy.shape[1:3] != (self.config.channels, 1):
            raise ValueError(
                f"latents of {noisy.shape[1]} channels and {noisy.shape[2]} frames, the model takes "
                f"{self.config.channels} channels of an image"
            )
        if noisy.shape[-2] % PATCH or noisy.shape[-1] % PATCH:
            raise ValueError(f"latents of {tuple(noisy.shape[-2:])} cannot be cut into patches of {PATCH}")

    def _embed_prompt(
        self, dtype: torch.dtype, states: Tensor, states_mask: Tensor, ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Embed prompts with the LLM adapter, padded to TEXT_ROWS tokens; arguments as in `embed`."""
        # Returns the embeddings, B T context_dim, and the number of tokens that each of the T stands for, T;
        # None if each stands for itself. On a CPU all padding may be stored as one token (`pad_texts`).
        embeddings = embed_prompts(
            self.llm_adapter,
            states,
            count_real(states_mask),
            ids=ids,
            weights=weights,
            max_tokens=TEXT_ROWS,
            attention=self.attention,
        )
        padded, repeats = pad_texts(embeddings, TEXT_ROWS, self.attention)
        return padded.to(dtype), repeats

    def unembed(self, x: Tensor, tokens: AnimaTokens) -> Tensor:
        """Project tokens B L C to the velocity, B Z 1 H W in float32."""
        rows, columns = tokens.grid
        patches = self.final_layer(x, tokens).float()
        # channels come last in a token, unlike in the input, where they come first
        return rearrange(
            patches, "b (h w) (ph pw z) -> b z 1 (h ph) (w pw)", h=rows, w=columns, ph=PATCH, pw=PATCH
        )

    def _make_table(self, grid: tuple[int, int], /, *, device: torch.device) -> Tensor:
        """Return the rotary table, (cosine, sine) pairs L 1 D/2 2 float32, from float64 angles."""
        axes = []
        sizes = (1, *grid)
        for size, width, ratio in zip(sizes, self.config.rotary_widths, self.config.rope_ratios, strict=True):
            theta = self.config.rope_theta * ratio ** (width / (width - 2))
            positions = torch.arange(size, dtype=torch.float64)
            axes.append(axis_rotations(positions, width, theta, device))
        return spread_over_grid(axes).unsqueeze(1)


def cut_patches(latents: Tensor) -> Tensor:
    """Cut latents, B Z 1 H W, into tokens of 2 x 2 latent pixels: B L (Z ph pw)."""
    return rearrange(latents, "b z 1 (h ph) (w pw) -> b (h w) (z ph pw)", ph=PATCH, pw=PATCH)


def count_real(mask: Tensor) -> list[int]:
    """Return the number of non-padding states per text. `mask` is B S, ideally on the host.

    Raises ValueError if padding precedes a real state.
    """
    real = mask != 0
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    counts: list[int]
    counts, ends = torch.stack([real.sum(dim=1), (real * positions).amax(dim=1)]).tolist()
    if counts != ends:
        raise ValueError(f"a text mask has padding before real tokens: {counts} real tokens end at {ends}")
    return counts
