"""Extended textual inversion in the U-Net: each cross-attention is given the states that are meant for it.

The context of a text holds the states for all cross-attentions, one after the other, in the order of their
names: the released numbers of the U-Net's blocks, IN01 to OUT11. Source: Voynov et al. 2023,
arXiv 2303.09522 (P+).
"""
# Letters: R rows, A cross-attentions, L tokens, C width

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modules.checkpoints.dialects import count
from stable_diffusion.contract import AskedPicture, Idea
from stable_diffusion.regions import put_back


def list_cross_attentions(names: Collection[str]) -> dict[str, str]:
    """Return the cross-attentions of a U-Net: their names in files -> diffusers' names of their modules.

    names: of diffusers' tensors.
    """
    found: dict[str, str] = {}
    # the first block on the way down is a convolution, and each halving is one more
    for side, short, number, halving in (("down", "IN", 1, 1), ("up", "OUT", 0, 0)):
        for level in itertools.count():
            blocks = count(names, rf"{side}_blocks\.{level}\.resnets\.\d+")
            if not blocks:
                break
            for place in range(blocks):
                path = f"{side}_blocks.{level}.attentions.{place}"
                if f"{path}.transformer_blocks.0.attn2.to_k.weight" in names:
                    found[f"{short}{number + place:02d}"] = path
            number += blocks + halving
        if side == "down":
            found["MID"] = "mid_block.attentions.0"
    return found


@dataclass(frozen=True, eq=False)
class LayerTexts:
    """Gives each cross-attention its part of the context, as long as a batch is made."""

    unet: Any
    paths: Sequence[str]  # of the transformers around them, in the order of the context; (): all share it

    @contextmanager
    def for_batch(self, pictures: Sequence[AskedPicture], width: int, height: int) -> Iterator[Idea | None]:
        """Set the U-Net up for a batch; it is put back at the end. Enter it before `Regions`."""
        with ExitStack() as stack:
            for place, path in enumerate(self.paths):
                for name, module in self.unet.get_submodule(path).named_modules():
                    if name.endswith(".attn2"):
                        stack.callback(put_back, module, module.__dict__.get("forward"))
                        module.forward = _with_own(module.forward, place, len(self.paths))
            yield None


def _with_own(attend: Callable[..., Tensor], place: int, places: int) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, **others: Any) -> Tensor:
        # encoder_hidden_states: R A*L C
        own = encoder_hidden_states.chunk(places, dim=1)[place]
        return attend(hidden_states, encoder_hidden_states=own, **others)

    return forward
