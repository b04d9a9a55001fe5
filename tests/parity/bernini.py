"""What Bernini-R computes with sources in its sequence, written from the facts of its release.

One sample at a time, in the dtype of the weights; nothing of ours is imported. `Mistake` has what a wrong
reading of the release would compute instead.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import conv3d, gelu, layer_norm, linear, pad, silu

EPS, HEAD, TEXT_LENGTH = 1e-6, 128, 512
PATCH = (1, 2, 2)
PAIRS = (22, 21, 21)  # of channels: frames, rows, columns
Weights = Mapping[str, Tensor]
Mistake = Literal[
    "", "no numbers", "reversed numbers", "positions joined", "phase on the frames' part", "time 0"
]
MISTAKES: tuple[Mistake, ...] = (
    *("no numbers", "reversed numbers", "positions joined", "phase on the frames' part", "time 0"),
)


def full(weights: Weights, name: str, x: Tensor) -> Tensor:
    return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def frequencies(pairs: int) -> Tensor:
    return 10000 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)


def angles(latents: Tensor, number: float, mistake: Mistake, first_frame: int) -> Tensor:
    """The rotation of each token of a part: tokens x 64."""
    sizes = [size // patch for size, patch in zip(latents.shape[1:], PATCH, strict=True)]
    axes = []
    for axis, (size, pairs) in enumerate(zip(sizes, PAIRS, strict=True)):
        places = torch.arange(size, dtype=torch.float64)
        if axis == 0 and mistake == "positions joined":
            places = places + first_frame
        shape = [1, 1, 1, pairs]
        shape[axis] = size
        axes.append((places[:, None] * frequencies(pairs)).view(shape).expand(*sizes, pairs))
    places = torch.cat(axes, -1).flatten(0, 2)
    if mistake in ("no numbers", "positions joined"):
        return places
    if mistake == "phase on the frames' part":
        return places + pad(number * frequencies(PAIRS[0]), (0, PAIRS[1] + PAIRS[2]))
    return places + number * frequencies(HEAD // 2)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = (table.to(x.dtype)[:, None] for table in (angle.cos(), angle.sin()))
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(HEAD)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def block(weights: Weights, name: str, x: Tensor, angle: Tensor, rows: Tensor, text: Tensor) -> Tensor:
    """rows: 6 tokens C, the modulation of each token."""
    width = x.shape[-1]
    shift, scale, gate, shift2, scale2, gate2 = weights[f"{name}.modulation"][0][:, None] + rows

    def heads(part: str, queries: Tensor, keys: Tensor) -> list[Tensor]:
        q = rms(full(weights, f"{name}.{part}.q", queries), weights[f"{name}.{part}.norm_q.weight"])
        k = rms(full(weights, f"{name}.{part}.k", keys), weights[f"{name}.{part}.norm_k.weight"])
        v = full(weights, f"{name}.{part}.v", keys)
        return [tensor.unflatten(-1, (width // HEAD, HEAD)) for tensor in (q, k, v)]

    h = layer_norm(x, (width,), eps=EPS) * (1 + scale) + shift
    q, k, v = heads("self_attn", h, h)
    x = x + gate * full(weights, f"{name}.self_attn.o", attend(rotate(q, angle), rotate(k, angle), v))
    h = layer_norm(x, (width,), weights[f"{name}.norm3.weight"], weights[f"{name}.norm3.bias"], EPS)
    x = x + full(weights, f"{name}.cross_attn.o", attend(*heads("cross_attn", h, text)))
    h = layer_norm(x, (width,), eps=EPS) * (1 + scale2) + shift2
    hidden = gelu(full(weights, f"{name}.ffn.0", h), approximate="tanh")
    return x + gate2 * full(weights, f"{name}.ffn.2", hidden)


def embed_time(weights: Weights, timestep: float) -> tuple[Tensor, Tensor]:
    """The embedded time C, and its modulation 6 C."""
    half = weights["time_embedding.0.weight"].shape[1] // 2
    phase = timestep * frequencies(half)
    wave = torch.cat([phase.cos(), phase.sin()]).to(weights["time_embedding.0.weight"].dtype)
    time = full(weights, "time_embedding.2", silu(full(weights, "time_embedding.0", wave)))
    return time, full(weights, "time_projection.1", silu(time)).reshape(6, -1)


def velocity(
    weights: Weights,
    noisy: Tensor,
    timestep: float,
    text: Tensor,
    sources: Sequence[Tensor] = (),
    mistake: Mistake = "",
) -> Tensor:
    """noise - clean of the target, C F H W; text: n D; sources: C f h w each, clean, in order."""
    parts = [*sources, noisy]
    numbers = [float(number) for number in range(1, len(sources) + 1)]
    if mistake == "reversed numbers":
        numbers.reverse()
    angle, tokens, frames = [], [], 0
    for part, number in zip(parts, [*numbers, 0.0], strict=True):
        angle.append(angles(part, number, mistake, frames))
        frames += part.shape[1]
        patches = conv3d(
            part[None], weights["patch_embedding.weight"], weights["patch_embedding.bias"], PATCH
        )
        tokens.append(patches[0].flatten(1).T)
    x = torch.cat(tokens)
    count = len(tokens[-1])
    time, rows = embed_time(weights, timestep)
    per_token = rows[:, None].expand(-1, len(x), -1)
    if mistake == "time 0":
        _, still = embed_time(weights, 0.0)
        clean = still[:, None].expand(-1, len(x) - count, -1)
        per_token = torch.cat([clean, per_token[:, -count:]], 1)
    text = pad(text, (0, 0, 0, TEXT_LENGTH - len(text)))  # zeros, not masked
    hidden = gelu(full(weights, "text_embedding.0", text), approximate="tanh")
    text = full(weights, "text_embedding.2", hidden)
    for index in range(sum(name.endswith("norm3.weight") for name in weights)):
        x = block(weights, f"blocks.{index}", x, torch.cat(angle), per_token, text)
    shift, scale = weights["head.modulation"][0] + time
    normed = layer_norm(x[-count:], (x.shape[-1],), eps=EPS) * (1 + scale) + shift
    sizes = [size // patch for size, patch in zip(noisy.shape[1:], PATCH, strict=True)]
    y = full(weights, "head.head", normed).reshape(*sizes, *PATCH, len(noisy))
    return y.permute(6, 0, 3, 1, 4, 2, 5).reshape(noisy.shape)


def project(change: Tensor, better: Tensor) -> Tensor:
    """A step of projected guidance between clean estimates, C F H W float64, for each latent frame."""

    def length(x: Tensor) -> Tensor:
        return x.square().sum((0, 2, 3), keepdim=True).sqrt()

    change = change * (50 / length(change)).clamp(max=1)
    unit = better / length(better)
    along = (change * unit).sum((0, 2, 3), keepdim=True) * unit
    return change - 0.5 * along


def guide_projected(
    noisy: Tensor, sigma: float, passes: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """The velocity of a chain of passes, the plainest first."""
    clean = [noisy.double() - sigma * one.double() for one in passes]
    guided = clean[0]
    for index, weight in enumerate(weights):
        guided = guided + weight * project(clean[index + 1] - clean[index], clean[index + 1])
    return ((noisy.double() - guided) / sigma).to(noisy.dtype)


def guide(passes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The velocity of a chain of passes with plain guidance."""
    guided = passes[0]
    for index, weight in enumerate(weights):
        guided = guided + weight * (passes[index + 1] - passes[index])
    return guided
