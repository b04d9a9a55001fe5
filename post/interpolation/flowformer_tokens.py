"""What FlowFormer's encoder and decoder share: attention of a few tokens, and waves that tell places."""

import torch
from torch import Tensor, nn

HEADS = 8  # as trained, in all attentions but the trunk's; not seen in any tensor


class TokenAttention(nn.Module):
    """Attention of queries to tokens and two linear layers, both added to the queries."""

    def __init__(self, width: int, given: int, joined: bool = False) -> None:
        """given: width of the tokens. joined: the queries stand beside what they found, before `proj`."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(given, width)
        self.v = nn.Linear(given, width)
        self.proj = nn.Linear(2 * width if joined else width, width)
        # numbered as in the files, where one layer has no weights
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Identity(), nn.Linear(width, width))
        self.joined = joined

    def keep(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values B T C of tokens B T `given`."""
        return self.k(tokens), self.v(tokens)

    def forward(
        self, x: Tensor, kept: tuple[Tensor, Tensor] | None = None, code: Tensor | float = 0.0
    ) -> Tensor:
        """Return B Q C of queries x: B Q C.

        kept: what `keep` made of tokens; None: the queries attend to each other. code: added to what they
        ask.
        """
        asking = self.norm1(x)
        k, v = self.keep(asking) if kept is None else kept
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (self.q(asking + code), k, v))
        # plain products: the fused attention is slow for so few tokens, and limits how many places there are
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1)  # B heads Q T
        found = (weights @ v).transpose(1, 2).flatten(2)
        x = x + self.proj(torch.cat([found, x], dim=-1) if self.joined else found)
        return x + self.ffn(self.norm2(x))


def position_code(places: Tensor, width: int) -> Tensor:
    """Return ... `width` of places ... 2 (x, y): sines of x, cosines of x, then of y. float32."""
    step = 3.14 / 200  # as trained: not pi
    waves = places[..., None] * (torch.arange(width // 4, device=places.device) * step)
    return torch.cat([waves.sin(), waves.cos()], dim=-1).flatten(-2)


def places_of(height: int, width: int, device: torch.device) -> Tensor:
    """Return H W 2: the place (x, y) of each cell, in float32."""
    rows = torch.arange(height, device=device, dtype=torch.float32)
    columns = torch.arange(width, device=device, dtype=torch.float32)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1)
