"""MOSS-Image's transformer in plain torch, sample by sample, after the facts about the released model.

Nothing of ours is imported. Modules have the released names, so that a released file fills them.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

EPS, BASE = 1e-6, 10000.0


class Scale(nn.Module):
    """RMSNorm: each row of unit size, times a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.weight


def capped(value: Tensor, gate: Tensor) -> Tensor:
    return 100 * (gate / 4).tanh() * gate.sigmoid() * (value / 25).tanh()


def turn(heads: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (j, j + D/2) of heads, n N D, by angles, n D/2: as complex numbers."""
    first, second = heads.chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of n N D to m N D -> n N*D."""
    shares = (torch.einsum("qnd,knd->nqk", query, key) / math.sqrt(query.shape[-1])).softmax(-1)
    return torch.einsum("nqk,knd->qnd", shares, value).flatten(1)


class Block(nn.Module):
    def __init__(self, dim: int, head: int, ffn: int, of_text: bool) -> None:
        super().__init__()
        self.head = head
        self.norm1, self.norm2 = Scale(dim), Scale(dim)
        self.q_norm, self.k_norm = Scale(head), Scale(head)
        if of_text:
            self.qkv = nn.Linear(dim, 3 * dim)
            self.proj: nn.Module = nn.Linear(dim, dim)
            self.ffn_gate, self.ffn_up = nn.Linear(dim, ffn), nn.Linear(dim, ffn)
            self.ffn_down = nn.Linear(ffn, dim)
            return
        widths = {**dict.fromkeys("qkvo", (dim, dim)), "ffn_up_gate": (dim, 2 * ffn), "ffn_down": (ffn, dim)}
        self.proj = nn.ModuleDict({name: nn.Linear(*sides, bias=False) for name, sides in widths.items()})

    def heads(self, parts: Sequence[Tensor], angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (part.unflatten(-1, (-1, self.head)) for part in parts)
        return turn(self.q_norm(query), angles), turn(self.k_norm(key), angles), value


class PlainMossImage(nn.Module):
    """weights: of a file in the released names, which give the sizes."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        shape = {name: tensor.shape for name, tensor in weights.items()}
        dim, channels = shape["video_embedder.weight"]
        head, ffn = shape["layers.0.q_norm.weight"][0], shape["layers.0.proj.ffn_down.weight"][1]
        counts = {
            start: len({name.split(start)[1].split(".")[0] for name in weights if name.startswith(start)})
            for start in ("layers.", "text_embedder.blocks.")
        }
        self.bands = BASE ** -(torch.arange(head // 8, dtype=torch.float64) / (head // 8))
        self.video_embedder = nn.Linear(channels, dim)
        self.text_embedder = nn.Module()
        self.text_embedder.proj = nn.Linear(shape["text_embedder.proj.weight"][1], dim)
        refiners = [Block(dim, head, ffn, True) for _ in range(counts["text_embedder.blocks."])]
        self.text_embedder.blocks = nn.ModuleList(refiners)
        waves = shape["time_embedding.0.weight"][1]
        self.time_embedding = nn.Sequential(nn.Linear(waves, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.shared_block_modulation = nn.Linear(dim, 6 * dim)
        self.layers = nn.ModuleList([Block(dim, head, ffn, False) for _ in range(counts["layers."])])
        self.final_norm_video = Scale(dim)
        self.final_linear_video = nn.Linear(dim, channels, bias=False)
        self.video_head_modulation = nn.Linear(dim, 2 * dim)
        self.load_state_dict({name: tensor.float() for name, tensor in weights.items()})

    def angles(self, places: Tensor) -> Tensor:
        """places: n 4 -> n D/2: the frequencies of the first axis, then of the second, ..."""
        return (places.double()[:, :, None] * self.bands).flatten(1).float()

    def places(self, grid: Tensor, number: int, clock: int) -> Tensor:
        """The place of each pixel of C h w: picture, clock, row and column from the middle."""
        rows, columns = (torch.arange(side) - (side - 1) / 2 for side in grid.shape[1:])
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        same = torch.ones_like(row)
        return torch.stack([number * same, clock * same, row, column], -1).flatten(0, 1)

    def refine(self, text: Tensor, angles: Tensor) -> Tensor:
        x = self.text_embedder.proj(text)
        for block in self.text_embedder.blocks:
            heads = block.heads(block.qkv(block.norm1(x)).chunk(3, -1), angles)
            x = x + block.proj(mix(*heads))
            h = block.norm2(x)
            x = x + block.ffn_down(capped(block.ffn_up(h), block.ffn_gate(h)))
        return x

    def embed_time(self, time: Tensor) -> Tensor:
        half = self.time_embedding[0].in_features // 2
        phases = time.double() * BASE ** -(torch.arange(half, dtype=torch.float64) / half)
        return self.time_embedding(torch.cat([phases.cos(), phases.sin()]).float())

    def forward(
        self,
        noisy: Tensor,
        time: Tensor,
        text: Tensor,
        references: Sequence[Tensor] = (),
        joint: bool = False,
    ) -> Tensor:
        """noisy: C h w. time: of 1000. text: T D. references: C h w each -> noise - picture, C h w."""
        clock = len(text)
        words = torch.zeros(clock, 4)
        words[:, 1] = torch.arange(clock)
        places = [self.places(noisy, 0, clock), words]
        places += [self.places(each, number, clock) for number, each in enumerate(references, 1)]
        angles = self.angles(torch.cat(places))
        pixels = [self.video_embedder(each.flatten(1).T) for each in (noisy, *references)]
        first, live = len(pixels[0]), len(pixels[0]) + clock
        x = torch.cat([pixels[0], self.refine(text, angles[first:live]), *pixels[1:]])
        vector = self.embed_time(time)
        moved = self.shared_block_modulation(vector).expand(live, -1)
        still = self.shared_block_modulation(self.embed_time(0 * time)).expand(len(x) - live, -1)
        rows = torch.cat([moved, still]).chunk(6, -1)
        for block in self.layers:
            h = block.norm1(x) * (1 + rows[1]) + rows[0]
            query, key, value = block.heads([block.proj[name](h) for name in "qkv"], angles)
            if references and not joint:
                alone = mix(query[live:], key[live:], value[live:])
                mixed = torch.cat([mix(query[:live], key, value), alone])
            else:
                mixed = mix(query, key, value)
            x = x + block.proj["o"](mixed) * rows[2]
            h = block.norm2(x) * (1 + rows[4]) + rows[3]
            values, gates = block.proj["ffn_up_gate"](h).chunk(2, -1)
            x = x + block.proj["ffn_down"](capped(values, gates)) * rows[5]
        shift, scale = self.video_head_modulation(vector).chunk(2)
        h = self.final_norm_video(x[:first]) * (1 + scale) + shift
        return self.final_linear_video(h).T.unflatten(1, noisy.shape[1:])
