"""Extended textual inversion in the U-Net: give each cross-attention its own text states.

The context of a text contains the states for all cross-attentions, one after the other, in the order of their
names: the released numbers of the U-Net's blocks, IN01 to OUT11. Source: Voynov et al. 2023, arXiv 2303.09522
(P+).
"""
# Letters: A cross-attentions, L states of a text, C width, R rows of a batch

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from checkpoints.dialects import count
from stable_diffusion.contract import RequestedImage, UnetHook
from stable_diffusion.names import unet_blocks
from stable_diffusion.regions import restore_forward


def list_cross_attentions(names: Collection[str]) -> dict[str, str]:
    """Map the names of cross-attentions in XTI files (IN01, MID, OUT03) to module paths in diffusers.

    Args:
        names: The U-Net's tensors, by their names in diffusers.
    """
    levels = range(count(names, r"down_blocks\.\d+"))
    layers = [count(names, rf"down_blocks\.{level}\.resnets\.\d+") for level in levels]
    paths = {}
    for block in unet_blocks(layers):
        path = block.diffusers_path
        if f"{path}.transformer_blocks.0.attn2.to_k.weight" not in names:
            continue
        ldm_list, index, *_ = block.ldm_path.split(".")  # such as input_blocks.1.1
        if ldm_list == "middle_block":
            paths["MID"] = path
        else:
            prefix = "IN" if ldm_list == "input_blocks" else "OUT"
            paths[f"{prefix}{int(index):02d}"] = path
    return dict(sorted(paths.items()))


@dataclass(frozen=True, eq=False)
class LayerTexts:
    """Give each cross-attention its own text states while a batch is generated."""

    unet: Any
    # paths of the transformers around the cross-attentions, in the context's order; () if all share it
    paths: Sequence[str]

    @contextmanager
    def apply_to_batch(
        self, requests: Sequence[RequestedImage], width: int, height: int
    ) -> Iterator[UnetHook | None]:
        """Modify the U-Net for a batch and restore it at the end; enter this before `Regions`."""
        with ExitStack() as stack:
            for module, forward in split_context_by_layer(self.unet, self.paths):
                stack.callback(restore_forward, module, forward)
            yield None


def split_context_by_layer(
    unet: nn.Module, paths: Sequence[str]
) -> list[tuple[nn.Module, Callable[..., Tensor] | None]]:
    """Replace the forward of each cross-attention by one that attends to its own slice of the text states.

    Args:
        unet: The U-Net.
        paths: Paths of the transformers around the cross-attentions, in the order of the slices.

    Returns:
        The changed modules, each with the instance attribute `forward` to restore; None if it had none.
    """
    changed = []
    for index, path in enumerate(paths):
        for name, module in unet.get_submodule(path).named_modules():
            if name.endswith(".attn2"):
                changed.append((module, module.__dict__.get("forward")))
                module.forward = _attend_to_slice(module.forward, index, len(paths))
    return changed


def _attend_to_slice(
    attend: Callable[..., Tensor], layer_index: int, num_layers: int
) -> Callable[..., Tensor]:
    """Return a cross-attention to slice `layer_index` of a context of `num_layers` concatenated slices."""

    def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, **settings: Any) -> Tensor:
        # encoder_hidden_states: R A*L C
        own_states = encoder_hidden_states.chunk(num_layers, dim=1)[layer_index]
        return attend(hidden_states, encoder_hidden_states=own_states, **settings)

    return forward
