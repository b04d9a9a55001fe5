"""A second text from which attention is steered away, in models whose picture and text attend to each other.

The second text stands behind the first one and goes its own way through the blocks. The picture attends to
itself and the first text, and once more to itself and the second one; the results of its tokens for the two
are combined. Each text attends to the picture and itself, as if it were the only one.
Source: Chen et al. 2025, arXiv 2505.21179, for transformers with joint attention.
"""
# Letters: B batch, L tokens of picture or video, T tokens of the first text, T' of the second, N heads

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.attention.attend import Lengths

# outputs of attention to the text asked for and to another one, each B L N D -> what takes their place
Steer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SecondText:
    """Place of a second text among the tokens B L+T+T' ..., and its use."""

    before: int  # tokens of the picture, L
    count: int  # its own tokens, T'
    lengths: Lengths | None  # how many of the L + T' tokens are real; None: all
    steer: Steer

    def without(self, x: Tensor) -> Tensor:
        """Return the picture with the first text, B L+T ..."""
        return x[:, : -self.count]

    def alone(self, x: Tensor) -> Tensor:
        """Return the picture with the second text, B L+T' ..."""
        return torch.cat([x[:, : self.before], x[:, -self.count :]], dim=1)

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the attention of all tokens, B L+T+T' N D, from their attention with either text alone."""
        steered = self.steer(first[:, : self.before], second[:, : self.before])
        return torch.cat([steered, first[:, self.before :], second[:, self.before :]], dim=1)
