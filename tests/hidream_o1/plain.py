"""HiDream-O1-Image in plain torch, one sample at a time, after the facts about the released model.

Nothing of ours is imported. Weights have the names of the single files, without the vision tower. `mistake`
names what a port may get wrong.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

Look = tuple[int, int, int]  # index of a picture's first token in a text, its rows and columns of tokens
EPS, TARGET_AT, SMALLEST = 1e-6, 4096, 0.001
MISTAKES = (
    *("time upside down", "time 0..1", "sines first", "columns before channels", "target behind the text"),
    *(
        "time token causal",
        "all causal",
        "text sees all",
        "axes in blocks",
        "neighbors rotated",
        "no norms of heads",
    ),
)
# with references
EDIT_MISTAKES = (
    *("references at the image's places", "references counted from the text", "references overlap"),
    *("references noisy", "not looked at", "looked at in another order", "looks placed as text"),
    *("no deepstack", "deepstack one layer later", "deepstack of the patches"),
)


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that its tensors do not show, or not plainly."""

    layers: int
    head: int
    sections: tuple[int, int, int]
    patch: int
    freq: int
    theta: float = 5e6


class PlainHiDreamO1(nn.Module):
    """The tensors of a file as modules: Linear layers where they are matrices."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            path, _, leaf = name.rpartition(".")
            *folders, last = path.split(".")
            parent: nn.Module = self
            for folder in folders:
                if folder not in dict(parent.named_children()):
                    parent.add_module(folder, nn.Module())
                parent = parent.get_submodule(folder)
            if last not in dict(parent.named_children()):
                shape, has_bias = state[f"{path}.weight"].shape, f"{path}.bias" in state
                is_linear = len(shape) == 2 and last != "embed_tokens"
                made = nn.Linear(*reversed(shape), bias=has_bias) if is_linear else nn.Module()
                parent.add_module(last, made)
            setattr(parent.get_submodule(last), leaf, nn.Parameter(tensor.clone()))


def layer(network: nn.Module, name: str, x: Tensor) -> Tensor:
    found: Tensor = network.get_submodule(name)(x)
    return found


def scaled(network: nn.Module, name: str, x: Tensor) -> Tensor:
    weight = network.get_parameter(f"{name}.weight")
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))


def cut(picture: Tensor, patch: int, mistake: str = "") -> Tensor:
    """3 H W -> rows of channel, row in the patch, column in the patch."""
    _, height, width = picture.shape
    x = picture.reshape(3, height // patch, patch, width // patch, patch)
    order = (1, 3, 2, 4, 0) if mistake == "columns before channels" else (1, 3, 0, 2, 4)
    return x.permute(*order).reshape(-1, 3 * patch**2)


def put_together(rows: Tensor, height: int, width: int, patch: int) -> Tensor:
    x = rows.reshape(height // patch, width // patch, 3, patch, patch)
    return x.permute(2, 0, 3, 1, 4).reshape(3, height, width)


def grid_places(rows: int, columns: int, start: int) -> Tensor:
    """3 x N: all axes begin at `start`; the first stands still, rows and columns count."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row).flatten(), row.flatten(), column.flatten()]) + start


def text_places(text: int, looks: Sequence[Look] = ()) -> Tensor:
    """3 x T positions of a text, in which pictures are grids of tokens, as in Qwen3-VL."""
    parts, at, index = [], 0, 0
    for first, rows, columns in looks:
        parts += [
            torch.arange(first - index).expand(3, -1) + at,
            grid_places(rows, columns, at + first - index),
        ]
        index, at = first + rows * columns, int(parts[-1].max()) + 1
    return torch.cat([*parts, torch.arange(text - index).expand(3, -1) + at], 1)


def places(text: int, rows: int, columns: int, mistake: str = "") -> Tensor:
    """3 x N positions of a text, whose last token is the time, and of an image's patches."""
    start = text if mistake == "target behind the text" else TARGET_AT
    return torch.cat([torch.arange(text).expand(3, -1), grid_places(rows, columns, start)], 1)


def edit_places(
    text: int, sizes: Sequence[tuple[int, int]], looks: Sequence[Look], mistake: str = ""
) -> Tensor:
    """The same with references; sizes: of the image and of them, in patches."""
    written = text_places(text, () if mistake == "looks placed as text" else looks)
    parts = [grid_places(*sizes[0], TARGET_AT)]
    for number, size in enumerate(sizes[1:]):
        start = int(parts[-1].max()) + 1
        if mistake == "references at the image's places":
            start = TARGET_AT
        elif mistake == "references counted from the text" and not number:
            start = int(written.max()) + 1
        elif mistake == "references overlap":
            start -= 1
        parts.append(grid_places(*size, start))
    return torch.cat([written, *parts], 1)


def angles(shape: Shape, where: Tensor, mistake: str = "") -> Tensor:
    """N x head/2: the axes take turns, and the rest is the first's. In float32, as released."""
    bands = 1 / shape.theta ** (torch.arange(0, shape.head, 2).float() / shape.head)
    axis = torch.zeros(shape.head // 2, dtype=torch.long)
    for number in (1, 2):
        axis[number : 3 * shape.sections[number] : 3] = number
    if mistake == "axes in blocks":
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(shape.sections))
    return where[axis].T.float() * bands


def rotate(x: Tensor, angle: Tensor, mistake: str = "") -> Tensor:
    """x: N, heads, head. The pair of channel j is channel j + head/2."""
    cos, sin = (table.to(x.dtype)[:, None] for table in (angle.cos(), angle.sin()))
    if mistake == "neighbors rotated":
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def seen(text: int, total: int, mistake: str = "") -> Tensor:
    """True where a row sees a column: a text is causal; its last token (the time) and patches see all."""
    if mistake == "text sees all":
        return torch.ones(total, total, dtype=torch.bool)
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    if mistake != "all causal":
        mask[text if mistake == "time token causal" else text - 1 :] = True
    return mask


def run_blocks(
    network: nn.Module,
    shape: Shape,
    x: Tensor,
    where: Tensor,
    mask: Tensor,
    mistake: str = "",
    deep: Sequence[Tensor] = (),
) -> Tensor:
    """deep: added to the results of the first blocks, like x."""
    angle = angles(shape, where, mistake)
    for number in range(shape.layers):
        start = f"language_model.layers.{number}."
        y = scaled(network, f"{start}input_layernorm", x)
        query, key, value = (
            layer(network, f"{start}self_attn.{name}_proj", y).unflatten(-1, (-1, shape.head))
            for name in "qkv"
        )
        if mistake != "no norms of heads":
            query = scaled(network, f"{start}self_attn.q_norm", query)
            key = scaled(network, f"{start}self_attn.k_norm", key)
        query, key = rotate(query, angle, mistake), rotate(key, angle, mistake)
        repeats = query.shape[1] // key.shape[1]
        key, value = (heads.repeat_interleave(repeats, 1) for heads in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(shape.head)
        shares = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        x = x + layer(
            network, f"{start}self_attn.o_proj", torch.einsum("hqk,khd->qhd", shares, value).flatten(1)
        )
        y = scaled(network, f"{start}post_attention_layernorm", x)
        gate, up = (layer(network, f"{start}mlp.{name}_proj", y) for name in ("gate", "up"))
        x = x + layer(network, f"{start}mlp.down_proj", silu(gate) * up)
        added = number - (mistake == "deepstack one layer later")
        if 0 <= added < len(deep):
            x = x + deep[added]
    return scaled(network, "language_model.norm", x)


def time_row(network: nn.Module, shape: Shape, clean: float, mistake: str = "") -> Tensor:
    """clean: 0 is noise, 1 the picture. Cosines first."""
    half = shape.freq // 2
    phase = 1000 * clean * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    waves = [phase.cos(), phase.sin()]
    if mistake == "sines first":
        waves = waves[::-1]
    wave = torch.cat(waves).float()
    return layer(network, "t_embedder1.mlp.2", silu(layer(network, "t_embedder1.mlp.0", wave)))


def predict_clean(
    network: nn.Module, shape: Shape, ids: Sequence[int], noisy: Tensor, sigma: float, mistake: str = ""
) -> Tensor:
    """The clean picture that the network sees behind `noisy`, 3 H W. ids end with the time token."""
    height, width = noisy.shape[1:]
    text = network.get_parameter("language_model.embed_tokens.weight")[torch.as_tensor(ids)[:-1]]
    clean = {"time upside down": sigma, "time 0..1": (1 - sigma) / 1000}.get(mistake, 1 - sigma)
    rows = layer(
        network, "x_embedder.proj2", layer(network, "x_embedder.proj1", cut(noisy, shape.patch, mistake))
    )
    x = torch.cat([text, time_row(network, shape, clean, mistake)[None], rows])
    where = places(len(ids), height // shape.patch, width // shape.patch, mistake)
    y = run_blocks(network, shape, x, where, seen(len(ids), len(x), mistake), mistake)
    out = layer(network, "final_layer2.linear", y[len(ids) :])
    return put_together(out, height, width, shape.patch)


def edit_clean(
    network: nn.Module,
    shape: Shape,
    ids: Sequence[int],
    noisy: Tensor,
    sigma: float,
    references: Sequence[Tensor],
    looks: Sequence[Look],
    features: Tensor,
    deep: Sequence[Tensor] = (),
    mistake: str = "",
) -> Tensor:
    """The same with clean references, 3 h w each, whose small copies are in the text.

    looks: their tokens in the text. features: rows for these tokens, deep: the same for the first blocks.
    """
    height, width = noisy.shape[1:]
    text = network.get_parameter("language_model.embed_tokens.weight")[torch.as_tensor(ids)[:-1]]
    spots = torch.cat([torch.arange(first, first + rows * columns) for first, rows, columns in looks])
    if mistake == "looked at in another order":
        features = features.flip(0)
    if mistake != "not looked at":
        text = text.index_copy(0, spots, features)
    pictures = [noisy, *references]
    if mistake == "references noisy":
        pictures = [noisy, *((1 - sigma) * picture for picture in references)]
    rows = torch.cat([cut(picture, shape.patch) for picture in pictures])
    patches = layer(network, "x_embedder.proj2", layer(network, "x_embedder.proj1", rows))
    x = torch.cat([text, time_row(network, shape, 1 - sigma)[None], patches])
    sizes = [(picture.shape[1] // shape.patch, picture.shape[2] // shape.patch) for picture in pictures]
    added = []
    for values in deep if mistake != "no deepstack" else ():
        moved = len(ids) if mistake == "deepstack of the patches" else 0
        added.append(torch.zeros_like(x).index_add(0, (spots + moved).clamp(max=len(x) - 1), values))
    where = edit_places(len(ids), sizes, looks, mistake)
    y = run_blocks(network, shape, x, where, seen(len(ids), len(x)), mistake, added)
    out = layer(network, "final_layer2.linear", y[len(ids) : len(ids) + math.prod(sizes[0])])
    return put_together(out, height, width, shape.patch)


def velocity(noisy: Tensor, clean: Tensor, sigma: float) -> Tensor:
    """Noise minus picture, as a flow solver wants it, in pixels."""
    return (noisy - clean) / max(sigma, SMALLEST)
