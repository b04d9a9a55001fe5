"""The vision tower of HiDream-O1-Image: Qwen3-VL's, which turns small copies of references into text tokens.

Names of modules are the released ones. Source: the report of Qwen3-VL, and its classes in transformers.
"""
# Letters: B batch, n tokens of an image, P patches of an image (several for each token), N heads, D head
# width, C width of the tower, V values of a patch

import math

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hidream_o1.configs import HiDreamO1VisionConfig
from modules.attention.attend import attend
from modules.devices import send_ahead
from modules.layers.half_rope import rotate_halves
from modules.layers.norms import run_in_weight_dtype
from modules.layers.rope import cos_and_sin

EPS = 1e-6
THETA = 10000.0  # of the rotary embedding


class HiDreamO1VisionAttention(nn.Module):
    """Attention of the patches of an image to each other."""

    def __init__(self, config: HiDreamO1VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Return the attention among the patches x, B P C, with rotary pairs P 1 D/2 2."""
        heads = run_in_weight_dtype(self.qkv, x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.unbind(2)  # each B P N D
        attended = attend(rotate_halves(query, rotary), rotate_halves(key, rotary), value)
        return run_in_weight_dtype(self.proj, attended.flatten(2))


class HiDreamO1VisionFeedForward(nn.Module):
    """Two layers with an approximated GELU between them."""

    def __init__(self, config: HiDreamO1VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.dim, config.ffn_dim)
        self.linear_fc2 = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to x, B P C."""
        hidden = functional.gelu(run_in_weight_dtype(self.linear_fc1, x), approximate="tanh")
        return run_in_weight_dtype(self.linear_fc2, hidden)


class HiDreamO1VisionBlock(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self, config: HiDreamO1VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, EPS)
        self.norm2 = nn.LayerNorm(config.dim, EPS)
        self.attn = HiDreamO1VisionAttention(config)
        self.mlp = HiDreamO1VisionFeedForward(config)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Apply the block to patches x, B P C, with rotary pairs P 1 D/2 2."""
        x = x + self.attn(run_in_weight_dtype(self.norm1, x), rotary)
        output: Tensor = x + self.mlp(run_in_weight_dtype(self.norm2, x))
        return output


class HiDreamO1Merger(nn.Module):
    """Merge the patches of each token, and project them to the decoder's width."""

    def __init__(self, config: HiDreamO1VisionConfig, norms_tokens: bool = False) -> None:
        """Build the layers; with `norms_tokens`, the norm is over all patches of a token, not over each."""
        super().__init__()
        self.width = config.dim * config.merge**2
        self.norm = nn.LayerNorm(self.width if norms_tokens else config.dim, EPS)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, config.out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens, B n out_dim, of patches, B P C, which are in the order of the tokens."""
        merged = x.reshape(*x.shape[:1], -1, self.width)
        norms_tokens = self.norm.normalized_shape == (self.width,)
        normalized = run_in_weight_dtype(self.norm, merged if norms_tokens else x).reshape(merged.shape)
        hidden = functional.gelu(run_in_weight_dtype(self.linear_fc1, normalized))
        return run_in_weight_dtype(self.linear_fc2, hidden)


class HiDreamO1Vision(nn.Module):
    """Turn an image into tokens: of its last layer, and of inner layers for the decoder's first ones."""

    def __init__(self, config: HiDreamO1VisionConfig) -> None:
        """Build the tower without weights."""
        super().__init__()
        self.config = config
        size = config.patch_size
        patch = config.frames, size, size  # an image is equal frames
        projection = nn.Conv3d(3, config.dim, patch, stride=patch)
        self.patch_embed = nn.ModuleDict({"proj": projection})
        self.pos_embed = nn.Embedding(config.position_side**2, config.dim)
        self.blocks = nn.ModuleList(HiDreamO1VisionBlock(config) for _ in range(config.num_layers))
        self.merger = HiDreamO1Merger(config)
        self.deepstack_merger_list = nn.ModuleList(
            HiDreamO1Merger(config, norms_tokens=True) for _ in config.deep_layers
        )

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return the features of an image, B n out_dim, then those of inner layers (DeepStack).

        With gradients, they are computed again in the backward pass, which takes little time and saves the
        memory of the tower's activations.

        Args:
            tokens: Pixels of the image's tokens, B n K uint8, as `hidream_o1.references.cut_tokens` returns.
            grid: Rows and columns of tokens.
        """
        size, merge = self.config.patch_size, self.config.merge
        patches = rearrange(
            tokens, "b n (r p s q c) -> b (n r s) (c p q)", r=merge, p=size, s=merge, q=size, c=3
        )
        if torch.is_grad_enabled():
            features: tuple[Tensor, ...] = checkpoint(self._run, patches, grid, use_reentrant=False)
            return features
        return self._run(patches, grid)

    def _run(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return what `forward` does for patches in the order of their tokens, B P V uint8."""
        rows, columns = self._list_positions(grid)
        # each pixel in -1..1, in float32 as transformers' image processor computes it
        values = (patches.float() / 255 - 0.5) / 0.5
        frames = rearrange(values, "b p (c v) -> b p c 1 v", c=3).expand(-1, -1, -1, self.config.frames, -1)
        # a product of matrices, because each patch is as large as the kernel
        weight = self.get_parameter("patch_embed.proj.weight").flatten(1)
        bias = self.get_parameter("patch_embed.proj.bias")
        x = functional.linear(frames.flatten(2).to(weight.dtype), weight, bias)
        x = x + self._interpolate_positions(rows, columns, grid).to(x.dtype)
        quarter = self.config.dim // self.config.num_heads // 4
        frequencies = 1 / THETA ** (torch.arange(quarter) / quarter)
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
        rotary = send_ahead(cos_and_sin(angles), x.device).unsqueeze(1)
        deep: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x, rotary)
            if index in self.config.deep_layers:
                deep.append(self.deepstack_merger_list[len(deep)](x))
        return self.merger(x), *deep

    def _list_positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the row and the column of each patch, P int64 each, in the order of the tokens."""
        merge = self.config.merge
        sides = (torch.arange(count * merge) for count in grid)
        positions = torch.stack(torch.meshgrid(*sides, indexing="ij"))
        ordered = rearrange(positions, "a (h r) (w s) -> a (h w r s)", r=merge, s=merge)
        return ordered[0], ordered[1]

    def _interpolate_positions(self, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return position embeddings, P C float32, of a square grid stretched over the patches' grid."""
        side, merge = self.config.position_side, self.config.merge
        table = self.pos_embed.weight
        weighted = torch.zeros(len(rows), self.config.dim, device=table.device)
        axes = []  # for rows and columns: the nearer positions in the square, and their shares
        for patches, count in ((rows, grid[0] * merge), (columns, grid[1] * merge)):
            places = torch.linspace(0, side - 1, count)[patches]
            low = places.floor().long()
            share = places - low
            axes.append(((low, 1 - share), ((low + 1).clamp(max=side - 1), share)))
        for row, row_share in axes[0]:
            for column, column_share in axes[1]:
                embeddings = self.pos_embed(send_ahead(row * side + column, table.device)).float()
                shares = send_ahead(row_share * column_share, table.device)[:, None]
                weighted = weighted + embeddings * shares
        return weighted


def count_side(number: int) -> int | None:
    """Return the side of a square grid of this many positions; None if they form no square."""
    side = math.isqrt(number)
    return side if number and side**2 == number else None
