"""Names of the U-Net's tensors in released single files, translated to diffusers' names.

The released names count the blocks from the input to the output in one row (`input_blocks.7`); diffusers
counts them within their level. Where a level ends is told by its downsampler.
"""

import re
from collections.abc import Callable, Collection, Sequence

from modules.checkpoints.dialects import Names, translate_name

_OUTSIDE: Names = (  # of the numbered blocks
    (r"time_embed\.0\.(.+)", r"time_embedding.linear_1.\1"),
    (r"time_embed\.2\.(.+)", r"time_embedding.linear_2.\1"),
    (r"label_emb\.0\.0\.(.+)", r"add_embedding.linear_1.\1"),
    (r"label_emb\.0\.2\.(.+)", r"add_embedding.linear_2.\1"),
    (r"input_blocks\.0\.0\.(.+)", r"conv_in.\1"),
    (r"out\.0\.(.+)", r"conv_norm_out.\1"),
    (r"out\.2\.(.+)", r"conv_out.\1"),
    (r"middle_block\.0\.(.+)", r"mid_block.resnets.0.\1"),
    (r"middle_block\.1\.(.+)", r"mid_block.attentions.0.\1"),
    (r"middle_block\.2\.(.+)", r"mid_block.resnets.1.\1"),
)
_RESNET: Names = (  # within a residual block
    (r"in_layers\.0\.(.+)", r"norm1.\1"),
    (r"in_layers\.2\.(.+)", r"conv1.\1"),
    (r"emb_layers\.1\.(.+)", r"time_emb_proj.\1"),
    (r"out_layers\.0\.(.+)", r"norm2.\1"),
    (r"out_layers\.3\.(.+)", r"conv2.\1"),
    (r"skip_connection\.(.+)", r"conv_shortcut.\1"),
)
_BLOCK = re.compile(r"(input|output)_blocks\.(\d{1,4})\.(\d)\.(.+)")


def read_levels(names: Collection[str]) -> tuple[int, ...]:
    """Return the residual blocks of each level on the way down. names: of the U-Net's tensors."""
    ends = sorted(
        int(found[1])
        for found in (re.fullmatch(r"input_blocks\.(\d{1,4})\.0\.op\.weight", name) for name in names)
        if found
    )
    numbers = {int(found[2]) for found in map(_BLOCK.fullmatch, names) if found and found[1] == "input"}
    bounds = [0, *ends, max(numbers, default=0) + 1]
    return tuple(end - start - 1 for start, end in zip(bounds, bounds[1:], strict=False))


def _place(number: int, layers: Sequence[int]) -> tuple[int, int]:
    """Return the level of a block and its place there; each level but the last has one more than `layers`.

    That one is the downsampler on the way down, and a residual block on the way up.
    """
    level = 0
    while level < len(layers) - 1 and number > layers[level]:
        number -= layers[level] + 1
        level += 1
    return level, number


def name_translator(names: Collection[str]) -> Callable[[str], str]:
    """Return a function: released name -> diffusers' name; one that it does not know stays as it is.

    names: of all tensors of the U-Net.
    """
    layers = read_levels(names)

    def translate(name: str) -> str:
        outside = translate_name(name, _OUTSIDE)
        if outside != name:
            return _in_resnet(outside)
        found = _BLOCK.fullmatch(name)
        if found is None:
            return name
        side, number, part, rest = found[1], int(found[2]), int(found[3]), found[4]
        is_down = side == "input"
        level, place = _place(number - 1, layers) if is_down else _place(number, layers[::-1])
        start = f"{'down' if is_down else 'up'}_blocks.{level}"
        if is_down and rest.startswith("op."):
            return f"{start}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        if not is_down and part > 0 and rest.startswith("conv."):
            return f"{start}.upsamplers.0.{rest}"
        if part == 0:
            return _in_resnet(f"{start}.resnets.{place}.{rest}")
        return f"{start}.attentions.{place}.{rest}"

    return translate


def _in_resnet(name: str) -> str:
    found = re.fullmatch(r"(.+\.resnets\.\d+)\.(.+)", name)
    return name if found is None else f"{found[1]}.{translate_name(found[2], _RESNET)}"
