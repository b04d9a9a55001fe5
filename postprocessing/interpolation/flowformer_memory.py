"""FlowFormer's cost encoder: turn the cost map of each position into a few tokens, its cost memory.

Source: Huang et al. 2022, arXiv 2203.16194, section 3.2.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from postprocessing.interpolation.layers import (
    Correlation,
    chunk_rows,
    grid_positions,
    map_in_chunks,
    map_row_ranges,
)
from postprocessing.interpolation.twins import WINDOW, TwinsBlock, apply_in_windows, attend

# Shared by FlowFormer's encoder and decoder: attention of a few tokens, and sinusoidal position codes.
HEADS = 8  # in the released model, in all attentions except the trunk's; tensor shapes do not reveal it


class TokenAttention(nn.Module):
    """Cross-attention of queries to tokens, then two linear layers, both with a residual connection."""

    def __init__(self, width: int, token_width: int, concatenates_input: bool = False) -> None:
        """Create cross-attention and feed-forward layers, with FlowFormer's module names.

        Args:
            width: Width of the queries.
            token_width: Width of the tokens.
            concatenates_input: Whether the input is concatenated to the attended values before `proj`.
        """
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(token_width, width)
        self.v = nn.Linear(token_width, width)
        self.proj = nn.Linear(2 * width if concatenates_input else width, width)
        # numbered as in the files, where one layer has no weights
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Identity(), nn.Linear(width, width))
        self.concatenates_input = concatenates_input

    def project_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B T C each) of tokens (B T token_width)."""
        return self.k(tokens), self.v(tokens)

    def forward(
        self, x: Tensor, keys_and_values: tuple[Tensor, Tensor] | None = None, code: Tensor | float = 0.0
    ) -> Tensor:
        """Attend from queries to tokens, then apply the feed-forward layers; return B Q C.

        Args:
            x: Queries, B Q C.
            keys_and_values: Result of `project_tokens` for the tokens; None for self-attention.
            code: Position code, added before the query projection.
        """
        normalized = self.norm1(x)
        k, v = self.project_tokens(normalized) if keys_and_values is None else keys_and_values
        # B heads tokens D each
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (self.q(normalized + code), k, v))
        # plain products: fused attention is slow for so few tokens, and limits the number of positions
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1)  # B heads Q T
        attended = (weights @ v).transpose(1, 2).flatten(2)
        if self.concatenates_input:
            attended = torch.cat([attended, x], dim=-1)
        x = x + self.proj(attended)
        return x + self.ffn(self.norm2(x))


def position_code(positions: Tensor, width: int) -> Tensor:
    """Return sine and cosine position codes of x, then of y, as ... width in float32.

    Args:
        positions: Positions (x, y), ... 2.
        width: Number of values per position.
    """
    step = 3.14 / 200  # the released model was trained with 3.14, not pi
    waves = positions[..., None] * (torch.arange(width // 4, device=positions.device) * step)
    return torch.cat([waves.sin(), waves.cos()], dim=-1).flatten(-2)


PATCH = 8  # side of the square of costs that becomes one token: three strides of two
COARSE = 4  # side of the square of positions that becomes one key, in the released model


@dataclass(frozen=True)
class MemoryConfig:
    """Sizes of the cost memory encoder."""

    tokens: int  # K
    width: int  # D
    context: int  # C
    projected_context_width: int  # channels of the context next to a token
    patch_widths: tuple[int, int, int]  # widths of the convolutions over a cost map
    layers: int


class CostEmbed(nn.Module):
    """Embed patches of cost maps as tokens, together with their positions."""

    def __init__(self, config: MemoryConfig) -> None:
        """Create the layers that embed 8 x 8 patches of cost maps, with FlowFormer's module names.

        Three convolutions of stride 2 make a patch one token; `ffn_with_coord` mixes in its position code.
        """
        super().__init__()
        first, second, third = config.patch_widths
        self.proj = nn.Sequential(
            nn.Conv2d(1, first, 6, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 6, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(second, third, 6, stride=2, padding=2),
        )
        self.ffn_with_coord = nn.Sequential(
            nn.Conv2d(2 * third, config.width, 1),  # 2: the token and a position code of equal width
            nn.ReLU(inplace=True),
            nn.Conv2d(config.width, config.width, 1),
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, maps: Tensor) -> Tensor:
        """Return tokens for patches of cost maps, N patches D.

        Args:
            maps: Cost maps, N 1 H W.
        """
        height, width = maps.shape[2:]
        x = self.proj(pad(maps, (0, -width % PATCH, 0, -height % PATCH)))
        centers = grid_positions(x.shape[2], x.shape[3], x.device) * PATCH + PATCH / 2
        code = position_code(centers, x.shape[1]).expand(len(x), -1, -1, -1)
        x = torch.cat([x.permute(0, 2, 3, 1), code], dim=-1).flatten(1, 2)
        # as matrix products: 1x1 convolutions are slower, and change the memory layout twice
        widen, activate, mix = self.ffn_with_coord.children()
        return self.norm(_multiply_rows(mix, activate(_multiply_rows(widen, x))))


def _multiply_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to rows, ... C."""
    weight, bias = layer.parameters()
    return linear(x, weight.flatten(1), bias)


class WindowContextAttention(nn.Module):
    """Self-attention within windows of positions, separately for each of the K tokens of a position."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.token_and_context_width = config.width + config.projected_context_width
        self.context_proj = nn.Linear(config.context, config.projected_context_width)
        self.q = nn.Linear(self.token_and_context_width, config.width)
        self.k = nn.Linear(self.token_and_context_width, config.width)
        self.v = nn.Linear(config.width, config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend within windows to tokens and their projected context; return K H W D.

        Args:
            x: Tokens, K H W D.
            context: Context features, 1 H W C.
        """
        projected = self.context_proj(context).expand(len(x), -1, -1, -1)
        # positions within a window, equal for all windows
        code = position_code(
            grid_positions(WINDOW, WINDOW, x.device).flatten(0, 1), self.token_and_context_width
        )
        width = x.shape[-1]

        def run(windows: Tensor) -> Tensor:
            coded = windows + code
            # values do not include the context
            return attend(self.q(coded), self.k(coded), self.v(windows[..., :width]), HEADS)

        return self.proj(apply_in_windows(run, torch.cat([x, projected], dim=-1)))


class CoarseContextAttention(nn.Module):
    """Attention from one token of each position to tokens pooled over COARSE x COARSE squares.

    Both sides of a map are multiples of COARSE, because the sides of an image are multiples of 32.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.token_and_context_width = config.width + config.projected_context_width
        self.context_proj = nn.Linear(config.context, config.projected_context_width)
        self.q = nn.Linear(self.token_and_context_width, config.width)
        self.k = nn.Linear(config.width, config.width)
        self.v = nn.Linear(config.width, config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.sr_key = nn.Conv2d(self.token_and_context_width, config.width, COARSE, COARSE)
        self.sr_value = nn.Conv2d(config.width, config.width, COARSE, COARSE)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from each position to a coarse grid of tokens and projected context; return K H W D.

        Args:
            x: Tokens, K H W D.
            context: Context features, 1 H W C.
        """
        height, width = x.shape[1:3]
        projected = self.context_proj(context).expand(len(x), -1, -1, -1)
        coded = torch.cat([x, projected], dim=-1)
        positions = grid_positions(height, width, x.device)
        q = self.q(coded + position_code(positions, self.token_and_context_width))
        coded = coded.permute(0, 3, 1, 2)
        keys = self.norm(self.sr_key(coded).permute(0, 2, 3, 1))
        # values come from the tokens alone, without the context
        values = self.norm(self.sr_value(coded[:, : x.shape[3]]).permute(0, 2, 3, 1))
        rows, columns = keys.shape[1:3]
        coarse_positions = grid_positions(rows, columns, x.device) * COARSE
        keys = keys + position_code(coarse_positions, x.shape[3])
        k = self.k(keys).flatten(1, 2)
        v = self.v(values).flatten(1, 2)
        return self.proj(attend(q.flatten(1, 2), k, v, HEADS)).view(x.shape)


class VerticalLayer(nn.Module):
    """Attention of each of a position's K tokens to the tokens with the same index at other positions."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.local_block = TwinsBlock(WindowContextAttention(config), config.width, eps=1e-5)
        self.global_block = TwinsBlock(CoarseContextAttention(config), config.width, eps=1e-5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the tokens after attention within windows and to a coarse grid, K H W D.

        Args:
            x: Tokens, K H W D.
            context: Context features, 1 H W C.
        """
        return self.global_block(self.local_block(x, context), context)


class CostPerceiver(nn.Module):
    """Encode the cost map of each position into a fixed number of tokens."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.latent_tokens = nn.Parameter(torch.empty(1, config.tokens, config.width))
        self.patch_embed = CostEmbed(config)
        self.input_layer = TokenAttention(config.width, config.width)
        self.encoder_layers = nn.ModuleList(
            TokenAttention(config.width, config.width) for _ in range(config.layers)
        )
        self.vertical_encoder_layers = nn.ModuleList(VerticalLayer(config) for _ in range(config.layers))
        self.config = config

    def forward(self, costs: Correlation, context: Tensor, chunk_bytes: int | None = None) -> Tensor:
        """Encode the matching costs of two images into the cost memory: K tokens for each position, N K D.

        Args:
            costs: Costs of a pair of images.
            context: Context features of the first image, 1 C H W.
            chunk_bytes: Approximate memory of one part; None for the best size for the device.
        """
        height, width = context.shape[2:]
        context = context.permute(0, 2, 3, 1)
        # one pair at a time: the network was trained with a batch's contexts in another order than its tokens
        x = embedded_costs = self._embed_costs(costs, height, width, chunk_bytes)
        for across, vertical in zip(self.encoder_layers, self.vertical_encoder_layers, strict=True):
            # 40 and 64: bytes that the layers take for each number of a row
            x = map_in_chunks(across, x, 40 * x[0].numel(), chunk_bytes)
            # for the vertical layers, each of the K tokens forms an H x W map
            maps = x.transpose(0, 1).unflatten(1, (height, width))  # K H W D
            maps = map_in_chunks(partial(vertical, context=context), maps, 64 * maps[0].numel(), chunk_bytes)
            x = maps.flatten(1, 2).transpose(0, 1)
        return x + embedded_costs

    def _embed_costs(self, costs: Correlation, height: int, width: int, chunk_bytes: int | None) -> Tensor:
        """Return the first memory tokens: learned tokens that attend to each position's cost map, N K D."""
        layer = self.input_layer

        def run(start: int, end: int) -> Tensor:
            tokens = self.patch_embed(costs.correlate_rows(start, end)[:, None])
            return layer(self.latent_tokens.expand(end - start, -1, -1), layer.project_tokens(tokens))

        bytes_per_map = _estimate_map_bytes(self.config, height, width)
        rows = chunk_rows(bytes_per_map, self.latent_tokens.device, chunk_bytes)
        return map_row_ranges(run, height * width, rows)


def _estimate_map_bytes(config: MemoryConfig, height: int, width: int) -> int:
    """Return the peak memory in bytes, for float32, of embedding the cost map of one position."""
    first, second, _ = config.patch_widths
    # both sides rounded up to multiples of PATCH
    cells = (height + -height % PATCH) * (width + -width % PATCH)
    # convolutions, in sixteenths of a value for each cell: the map, the padded map, and two results
    convolved = 2 * 16 + 4 * first + second
    # attention, in 64ths: the map, tokens, keys, values, products before and after the softmax
    attended = 64 + 3 * (config.width + HEADS * config.tokens)
    return cells * max(convolved // 4, attended // 16)  # 4 bytes / 16, 4 bytes / 64
