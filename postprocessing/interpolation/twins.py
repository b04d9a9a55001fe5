"""The first stages of a Twins-SVT trunk: image features by attention in windows and to a coarse grid.

Source: Chu et al. 2021, arXiv 2104.13840; layout of the tensors as in FlowFormer's files (`svt`).
"""
# Letters: B batch, C width, H W sides of a map, N = H * W places

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention

from postprocessing.interpolation.layers import map_in_chunks

WINDOW = 7  # side of a window in positions in the released model; tensor shapes do not reveal it
HEAD_WIDTH = 32  # in the released model: 4 and 8 heads for the widths 128 and 256


@dataclass(frozen=True)
class StageConfig:
    """Sizes of one Twins stage."""

    patch: int  # side of the square of positions that is merged into one
    width: int
    reduction: int  # side of the square of positions that becomes one key of the coarse attention


class TwinsMlp(nn.Module):
    """MLP of a Twins block: two linear layers around a GELU, applied to each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features after the MLP, ... C."""
        wide = 4 * self.fc1.out_features  # bytes
        return map_in_chunks(self._run, x.flatten(0, -2), bytes_per_row=3 * wide).view(x.shape)

    def _run(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class TwinsBlock(nn.Module):
    """Attention over a feature map and an MLP, both with residual connections."""

    def __init__(self, attn: nn.Module, width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = TwinsMlp(width)

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """Return features after attention and MLP, B H W C.

        Args:
            x: Features, B H W C.
            inputs: Additional inputs of the attention.
        """
        x = x + self.attn(self.norm1(x), *inputs)
        return x + self.mlp(self.norm2(x))


class WindowAttention(nn.Module):
    """Self-attention within windows of a feature map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features after windowed attention, B H W C."""

        def run(windows: Tensor) -> Tensor:
            q, k, v = self.qkv(windows).chunk(3, dim=-1)
            return attend(q, k, v, self.heads)

        return self.proj(apply_in_windows(run, x))


class CoarseAttention(nn.Module):
    """Attention from each position to a coarse grid with one key per `reduction` x `reduction` positions."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.sr = nn.Conv2d(width, width, reduction, reduction)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features after attention to the coarse grid, B H W C; H and W are at least `reduction`."""
        squares = self.norm(self.sr(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2))
        k, v = self.kv(squares).chunk(2, dim=-1)
        return self.proj(attend(self.q(x.flatten(1, 2)), k, v, self.heads)).view(x.shape)


class TwinsPatchEmbed(nn.Module):
    """Merge each `patch` x `patch` square of positions into one position."""

    def __init__(self, channels: int, config: StageConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, config.width, config.patch, config.patch)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features with `patch` x `patch` positions merged, B H/patch W/patch C.

        Args:
            x: Features, B channels H W.
        """
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PositionConv(nn.Module):
    """Add a depthwise convolution of the features, which encodes positions for the following attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width))

    def forward(self, x: Tensor) -> Tensor:
        """Return features with position information added, B H W C."""
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Twins(nn.Module):
    """Twins transformer that returns features of every stage."""

    def __init__(self, stages: tuple[StageConfig, ...]) -> None:
        """Create the encoder's layers, with the module names of the released FlowFormer file."""
        super().__init__()
        input_widths = (3, *(stage.width for stage in stages))
        self.patch_embeds = nn.ModuleList(map(TwinsPatchEmbed, input_widths, stages))
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                TwinsBlock(attention, stage.width, eps=1e-6)  # the released model's eps
                for attention in (
                    WindowAttention(stage.width),
                    CoarseAttention(stage.width, stage.reduction),
                )
            )
            for stage in stages
        )
        self.pos_block = nn.ModuleList(PositionConv(stage.width) for stage in stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of each encoder stage, B C h w.

        Args:
            images: Images, B 3 H W, -1..1.
        """
        x = images
        outputs = []
        for embed, pair, neighbors in zip(self.patch_embeds, self.blocks, self.pos_block, strict=True):
            windowed, coarse = pair.children()
            x = coarse(neighbors(windowed(embed(x)))).permute(0, 3, 1, 2)
            outputs.append(x)
        return outputs


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Compute multi-head attention of q (B N C) to k and v (B M C); returns B N C."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def apply_in_windows(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply attention to WINDOW x WINDOW windows of a feature map, and reassemble the map.

    Args:
        run: Maps (windows, WINDOW ** 2, C) to the same shape with any C.
        x: Features, B H W C. They are zero-padded to whole windows, right and bottom; this padding
            takes part, as in training.
    """
    batch, height, width, _ = x.shape
    x = pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
    rows, columns = x.shape[1] // WINDOW, x.shape[2] // WINDOW
    # B rows columns WINDOW WINDOW C
    windows = x.unflatten(2, (columns, WINDOW)).unflatten(1, (rows, WINDOW)).transpose(2, 3)
    windows = windows.flatten(3, 4).flatten(0, 2)  # (B rows columns) WINDOW**2 C
    # 32 bytes for each value: queries, keys, values, their copies by head, and results
    results = map_in_chunks(run, windows, bytes_per_row=32 * windows[0].numel()).view(
        batch, rows, columns, WINDOW, WINDOW, -1
    )
    return results.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
