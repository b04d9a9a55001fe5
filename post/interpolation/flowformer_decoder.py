"""FlowFormer's decoder: refine one estimate of the flow over and over, by asking each place's memory.

Sources: Huang et al. 2022, arXiv 2203.16194, section 3.3; Jiang et al. 2021, arXiv 2104.02409 (motion of
places that look alike, for those that are hidden in the second picture).
"""
# Letters: N = H * W places of the first picture, K tokens of one place, D their width, C width of the context

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from post.interpolation.correlation import SIDE, Correlation, grid_of
from post.interpolation.flowformer_tokens import TokenAttention, position_code
from post.interpolation.parts import rows_of_part
from post.interpolation.raft import FlowHead, MotionEncoder, SeparableGru, upsample_flow, upsampling_mask

COSTS = SIDE**2  # read about each place in every iteration


@dataclass(frozen=True)
class FlowDecoderConfig:
    """Dimensions of the decoder."""

    memory: int  # D
    query: int
    hidden: int  # of the recurrent unit and as much of the context; half of C
    compared: int  # queries and keys of the attention between places that look alike
    correlation: tuple[int, int]  # widths of the motion encoder
    flow: tuple[int, int]
    motion: int  # with the two channels of the flow
    head: int
    mask: int


class Alike(nn.Module):
    """How alike places of the first picture are."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__()
        self.to_qk = nn.Conv2d(config.hidden, 2 * config.compared, 1, bias=False)

    def forward(self, context: Tensor, keeps_table: bool) -> Callable[[Tensor], Tensor]:
        """context: 1 C H W. Returns a function from a map to its means over places that look alike.

        keeps_table: the weights of all pairs of places are kept, not computed anew in every call.
        """
        q, k = (x.contiguous() for x in _rows(self.to_qk(context)).chunk(2, dim=1))  # N . each
        if keeps_table:
            weights = q.new_empty(len(q), len(k))
            rows = rows_of_part(8 * len(k), q.device)
            scaled = q * q.shape[1] ** -0.5
            for part, asking in zip(weights.split(rows), scaled.split(rows), strict=True):
                part.copy_((asking @ k.T).softmax(dim=1))
            return lambda x: _over_places(x, lambda v: weights @ v)
        # four axes: with fewer there is no kernel that leaves out the table
        asking, known = q[None, None], k[None, None]
        return lambda x: _over_places(
            x, lambda v: scaled_dot_product_attention(asking, known, v[None, None])[0, 0]
        )


class Aggregator(nn.Module):
    """Add motion of places that look alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_v = nn.Conv2d(width, width, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, motion: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        """motion: 1 C H W. mean: of `Alike`."""
        return motion + self.gamma * mean(self.to_v(motion))


class FlowFormerUpdate(nn.Module):
    """One refinement of the flow."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__()
        inputs = config.query + COSTS
        self.encoder = MotionEncoder(inputs, config.correlation, config.flow, config.motion)
        self.aggregator = Aggregator(config.motion)
        self.gru = SeparableGru(config.hidden, config.hidden + 2 * config.motion)
        self.flow_head = FlowHead(config.hidden, config.head)
        self.mask = upsampling_mask(config.hidden, config.mask)


class DecoderLayer(nn.Module):
    """Holds the attention to the memory, for the sake of its name in the files."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__()
        self.cross_attend = TokenAttention(config.query, config.memory, joined=True)


class MemoryDecoder(nn.Module):
    """Flow of the first picture's places."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(2 * config.hidden, 2 * config.hidden, 1)
        self.flow_token_encoder = nn.Sequential(
            nn.Conv2d(COSTS, config.query, 1), nn.GELU(), nn.Conv2d(config.query, config.query, 1)
        )
        self.decoder_layer = DecoderLayer(config)
        self.update_block = FlowFormerUpdate(config)
        self.att = Alike(config)

    def forward(
        self, costs: Correlation, memory: Tensor, context: Tensor, iterations: int, keeps_table: bool
    ) -> Tensor:
        """memory: N K D. context: 1 C H W of the first picture. keeps_table: see `Alike`.

        Returns the flow, 1 2 8H 8W.
        """
        hidden, context = self.proj(context).chunk(2, dim=1)
        hidden, context = torch.tanh(hidden), relu(context)
        # what stays the same in all iterations
        layer, block = self.decoder_layer.cross_attend, self.update_block
        mean = self.att(context, keeps_table)
        kept, turns = layer.keep(memory), block.gru.turns(context)
        start = places = grid_of(context)
        for _ in range(iterations):
            near = costs.lookup(places)
            query = self.flow_token_encoder(near)
            code = position_code(_rows(places), query.shape[1])
            recalled = layer(_rows(query)[:, None], kept, code[:, None])
            recalled = recalled.squeeze(1).T.view(query.shape)
            motion = block.encoder(torch.cat([recalled, near], dim=1), places - start)
            moving = torch.cat([motion, block.aggregator(motion, mean)], dim=1)
            hidden = block.gru(hidden, moving, turns)
            places = places + block.flow_head(hidden)
        return upsample_flow(places - start, 0.25 * block.mask(hidden))


def _rows(x: Tensor) -> Tensor:
    """1 C H W -> N C."""
    return x[0].flatten(1).T


def _over_places(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of N C to 1 C H W."""
    return run(_rows(x).contiguous()).T.reshape(x.shape)
