"""CodeFormer: restore a face from entries of a learned codebook, which a transformer selects.

An encoder reads the damaged face, a transformer predicts a code for each position, a generator decodes the
codes to a face. The fidelity weights the encoder's features that the generator gets in addition. Source: Zhou
et al. 2022, arXiv 2206.11253; Esser et al. 2021 (VQGAN), arXiv 2012.09841.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, pad, scaled_dot_product_attention, silu

from checkpoints.dialects import LoadPlan, count, make_shape_reader, make_wrong_kind_error
from checkpoints.opening import Checkpoint, list_tensor_sources
from modules.errors import CheckpointError

# Letters: B faces, C channels, h w height and width of features, L positions with a code, D token width

GROUPS, EPS = 32, 1e-6  # of group norms
HEADS = 8
RELEASED_FILES = "codeformer.pth, or a safetensors file of the same tensors,"
RES, ATTENTION, RESIZE, NORM, CONV = "res", "attention", "resize", "norm", "conv"
# always float32, regardless of --dtype: choosing a code compares close numbers
CODE_PREDICTION_PREFIXES = ("feat_emb.", "ft_layers.", "idx_pred_layer.", "position_emb", "quantize.")


@dataclass(frozen=True)
class CodeFormerBlock:
    """Kind and channel counts of one block of the encoder or the generator."""

    kind: str  # RES, ATTENTION, RESIZE (the encoder halves, the generator doubles), NORM or CONV
    width_in: int
    width: int


@dataclass(frozen=True)
class CodeFormerConfig:
    """Blocks, codebook and transformer sizes of a CodeFormer."""

    encoder: tuple[CodeFormerBlock, ...]
    generator: tuple[CodeFormerBlock, ...]
    num_positions: int  # L, a square number
    tokens: int  # D
    hidden: int  # width inside a layer of the transformer
    layers: int
    codes: tuple[int, int]  # number of codes, and their width
    fusion_sizes: tuple[int, ...]  # sizes at which the generator sees the encoder's features

    @property
    def grid_size(self) -> int:
        """Side of the square of codebook entries that encodes a face."""
        return round(self.num_positions**0.5)

    @property
    def size(self) -> int:
        """Side of the face image in pixels."""
        return self.grid_size << sum(block.kind == RESIZE for block in self.encoder)


def _make_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=EPS)


def _make_conv(width_in: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, padding=1)


class ResBlock(nn.Module):
    """Two normalized convolutions with a residual connection."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = _make_norm(width_in)
        self.conv1 = _make_conv(width_in, width)
        self.norm2 = _make_norm(width)
        self.conv2 = _make_conv(width, width)
        self.conv_out = None if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the new features, B C H W."""
        changed = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return changed + (x if self.conv_out is None else self.conv_out(x))


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _make_norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return features after self-attention over all positions, B C H W."""
        normed = self.norm(x)
        # float32: in float16 the products of wide features may be beyond the range
        q, k, v = (
            rearrange(layer(normed), "b c h w -> b 1 (h w) c").float() for layer in (self.q, self.k, self.v)
        )
        mixed = scaled_dot_product_attention(q, k, v).to(x.dtype)
        return x + self.proj_out(rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Halving(nn.Module):
    """Convolution with stride 2 that pads only the right and bottom edges, by one pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of half the height and width, B C h w."""
        return self.conv(pad(x, (0, 1, 0, 1)))


class Doubling(nn.Module):
    """Nearest-neighbor upsampling by 2 and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _make_conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of twice the height and width."""
        return self.conv(interpolate(x, scale_factor=2, mode="nearest"))


def _build(blocks: Sequence[CodeFormerBlock], resize: Callable[[int], nn.Module]) -> nn.ModuleDict:
    """Build CodeFormer's encoder or generator from its blocks, in order."""
    modules = nn.ModuleList()
    for block in blocks:
        match block.kind:
            case "res":
                modules.append(ResBlock(block.width_in, block.width))
            case "attention":
                modules.append(AttentionBlock(block.width))
            case "resize":
                modules.append(resize(block.width))
            case "norm":
                modules.append(_make_norm(block.width))
            case _:
                modules.append(_make_conv(block.width_in, block.width))
    return nn.ModuleDict({"blocks": modules})


class CodeFormerAttention(nn.Module):
    """Multi-head attention; queries and keys include the position code, values do not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, placed: Tensor, plain: Tensor) -> Tensor:
        """Return features after attention, B L D.

        Args:
            placed: Features with the position code, B L D.
            plain: Features without the position code, B L D.
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            rearrange(linear(x, weight, bias), "b l (n d) -> b n l d", n=HEADS)
            for x, weight, bias in zip((placed, placed, plain), weights, biases, strict=True)
        )
        return self.out_proj(rearrange(scaled_dot_product_attention(q, k, v), "b n l d -> b l (n d)"))


class TransformerLayer(nn.Module):
    """Transformer layer: attention and an MLP, each after a norm and with a residual connection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = CodeFormerAttention(width)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Return features after attention and MLP, B L D.

        Args:
            x: Features, B L D.
            position: Position code, L D.
        """
        normed = self.norm1(x)
        x = x + self.self_attn(normed + position, normed)
        return x + self.linear2(nn.functional.gelu(self.linear1(self.norm2(x))))


class Fusion(nn.Module):
    """Scale and shift generator features with values computed from encoder features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encode_enc = ResBlock(2 * width, width)
        self.scale, self.shift = _make_condition_layers(width), _make_condition_layers(width)

    def forward(self, encoded: Tensor, x: Tensor, fidelity: float) -> Tensor:
        """Return generator features modulated by encoder features, B C h w.

        Args:
            encoded: Features of the encoder, B C h w.
            x: Features of the generator, B C h w.
            fidelity: Weight of the encoder, 0 to 1.
        """
        both = self.encode_enc(torch.cat([encoded, x], dim=1))
        return x + fidelity * (x * self.scale(both) + self.shift(both))


def _make_condition_layers(width: int) -> nn.Sequential:
    return nn.Sequential(_make_conv(width, width), nn.LeakyReLU(0.2), _make_conv(width, width))


class CodeFormer(nn.Module):
    """CodeFormer: restores faces that are aligned to the face template."""

    def __init__(self, config: CodeFormerConfig) -> None:
        """Create CodeFormer's modules with the names of the released file."""
        super().__init__()
        width = config.tokens
        codes, code_width = config.codes
        self.config = config
        self.encoder: Any = _build(config.encoder, Halving)
        self.generator: Any = _build(config.generator, Doubling)
        self.position_emb = nn.Parameter(torch.empty(config.num_positions, width))
        self.feat_emb = nn.Linear(code_width, width)
        self.ft_layers = nn.ModuleList(TransformerLayer(width, config.hidden) for _ in range(config.layers))
        self.idx_pred_layer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, codes, bias=False))
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codes, code_width)})
        # channels of the encoder's last block at each size, which is added to the generator
        widths = {size: config.encoder[block].width for size, block in last_blocks(config).items()}
        self.fuse_convs_dict = nn.ModuleDict(
            {str(size): Fusion(widths[size]) for size in config.fusion_sizes}
        )

    def forward(self, faces: Tensor, fidelity: float) -> Tensor:
        """Restore aligned faces: replace latents by codebook entries, and decode them, B 3 S S.

        Args:
            faces: Aligned faces, B 3 S S, -1..1.
            fidelity: Weight of the input, from 0 (the codebook's faces) to 1 (close to the input).
        """
        latents, encoded = self._encode(faces)
        codes = self.quantize["embedding"](self._predict_codes(latents))
        codes = rearrange(codes, "b (h w) c -> b c h w", h=self.config.grid_size)
        # adaptive instance normalization: the codes get the mean and standard deviation of the latents
        codes_mean, codes_std = _measure_statistics(codes)
        latents_mean, latents_std = _measure_statistics(latents.float())
        x = ((codes - codes_mean) / codes_std * latents_std + latents_mean).to(latents.dtype)
        return self._generate(x, encoded, fidelity).float()

    def _generate(self, x: Tensor, encoded: Mapping[int, Tensor], fidelity: float) -> Tensor:
        """Run the generator on x, B C h w; fuse `encoded`, the encoder's features by side length."""
        size = self.config.grid_size
        is_doubled = False
        for block, part in zip(self.generator["blocks"], self.config.generator, strict=True):
            x = block(x)
            if is_doubled and size in self.config.fusion_sizes and fidelity > 0:  # after a doubling's block
                x = self.fuse_convs_dict[str(size)](encoded[size], x, fidelity)
            is_doubled = part.kind == RESIZE
            size *= 2 if is_doubled else 1
        return x

    def codes(self, faces: Tensor) -> Tensor:
        """Return the index of the codebook entry for each position, B L.

        Args:
            faces: Aligned faces, B 3 S S, -1..1.
        """
        return self._predict_codes(self._encode(faces)[0])

    def _encode(self, faces: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the latents, B C h w, and the encoder features to fuse, keyed by their size."""
        x = faces.to(next(self.encoder.parameters()).dtype)
        sizes = {block: size for size, block in last_blocks(self.config).items()}
        fused = {}
        for number, block in enumerate(self.encoder["blocks"]):
            x = block(x)
            if sizes.get(number) in self.config.fusion_sizes:
                fused[sizes[number]] = x
        return x, fused

    def _predict_codes(self, latents: Tensor) -> Tensor:
        tokens = self.feat_emb(rearrange(latents.float(), "b c h w -> b (h w) c"))
        for layer in self.ft_layers:
            tokens = layer(tokens, self.position_emb)
        return self.idx_pred_layer(tokens).argmax(dim=-1)


def _measure_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of B C h w."""
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True)
    return mean, (variance + 1e-5).sqrt()


def last_blocks(config: CodeFormerConfig) -> dict[int, int]:
    """Map each feature size to the index of the encoder's last block with that size."""
    blocks = {}
    size = config.size
    for number, block in enumerate(config.encoder):
        if block.kind == RESIZE:
            blocks[size] = number - 1
            size //= 2
    return blocks


def read_codeformer(checkpoint: Checkpoint) -> LoadPlan[CodeFormerConfig]:
    """Plan the loading of a CodeFormer; the layer sizes are read from tensor shapes.

    Raises:
        CheckpointError: If the file is not a CodeFormer file.
    """
    tensor_names = checkpoint.tensors
    wrong_kind_error = make_wrong_kind_error(
        checkpoint, "a CodeFormer", "--model with --mode codeformer", RELEASED_FILES
    )
    if "idx_pred_layer.1.weight" not in tensor_names or "quantize.embedding.weight" not in tensor_names:
        raise wrong_kind_error
    sources = list_tensor_sources(checkpoint)
    shape = make_shape_reader(checkpoint, sources, wrong_kind_error)
    encoder = _read_blocks("encoder", checkpoint)
    generator = _read_blocks("generator", checkpoint)
    num_positions, tokens = shape("position_emb", 2)
    codes, code_width = shape("quantize.embedding.weight", 2)
    # sizes at which the decoder takes features of the encoder
    matches = [re.match(r"fuse_convs_dict\.(\d{1,5})\.", name) for name in tensor_names]
    config = CodeFormerConfig(
        encoder=encoder,
        generator=generator,
        num_positions=num_positions,
        tokens=tokens,
        hidden=shape("ft_layers.0.linear1.weight", 2)[0],
        layers=count(tensor_names, r"ft_layers\.\d+"),
        codes=(codes, code_width),
        fusion_sizes=tuple(sorted({int(match[1]) for match in matches if match})),
    )
    if not _is_possible(config):
        raise wrong_kind_error
    return LoadPlan(config, checkpoint, sources)


def _is_possible(config: CodeFormerConfig) -> bool:
    """Return whether the sizes read from a file are consistent with each other."""
    doublings = sum(block.kind == RESIZE for block in config.generator)
    normed = [block for block in (*config.encoder, *config.generator) if block.kind != CONV]
    return (
        config.grid_size**2 == config.num_positions
        and config.size == config.grid_size << doublings
        and set(config.fusion_sizes) <= last_blocks(config).keys()
        and config.tokens % HEADS == 0
        and not any(block.width_in % GROUPS or block.width % GROUPS for block in normed)
        and CONV in {block.kind for block in config.encoder[-1:]}
    )


# by a tensor that the kind has; the most specific first
_KIND_BY_TENSOR = {"conv1.weight": RES, "q.weight": ATTENTION, "conv.weight": RESIZE, "weight": CONV}


def _read_blocks(part: str, checkpoint: Checkpoint) -> tuple[CodeFormerBlock, ...]:
    """Return the configuration of the encoder's or the generator's blocks, from their tensors."""
    num_blocks = count(checkpoint.tensors, rf"{part}\.blocks\.\d+")
    return tuple(_read_block(f"{part}.blocks.{number}", checkpoint) for number in range(num_blocks))


def _read_block(name: str, checkpoint: Checkpoint) -> CodeFormerBlock:
    """Return the kind and the widths of a CodeFormer block, derived from the shapes of its tensors."""
    for tensor_name, kind in _KIND_BY_TENSOR.items():
        info = checkpoint.tensors.get(f"{name}.{tensor_name}")
        if info is None or not info.shape:
            continue
        width = info.shape[0]
        if kind == CONV and len(info.shape) == 1:  # a norm has a weight of the same name
            return CodeFormerBlock(NORM, width, width)
        width_in = info.shape[1] if len(info.shape) > 1 else width
        return CodeFormerBlock(kind, width_in, width)
    raise CheckpointError(
        f"{checkpoint.path} is incomplete: {name} is missing. Copy it again.", checkpoint.path
    )
