"""`--te_multiplier`: the text weighs more or less inside the transformer. Acts on a loaded transformer from
outside.
"""

from collections.abc import Callable

from torch import Tensor, nn

# of a token refiner: the list of its blocks, and what makes a vector of the text's mean
HUNYUAN_REFINER = ("txt_in.individual_token_refiner.blocks", "txt_in.c_embedder")
FRAMEPACK_REFINER = (
    "context_embedder.token_refiner.refiner_blocks",
    "context_embedder.time_text_embed.text_embedder",
)


def multiply_text(dit: nn.Module, refiner: tuple[str, str], llm: float, clip: float) -> None:
    """Multiply what the token refiner makes of the text, from now on. refiner: one of those above.

    llm: the output of each of its blocks, so a block sees what the one before gives times llm. clip: the
    vector of the text's mean that its gates are made from; despite the option's name that is the language
    model's too (CLIP's goes past the refiner).
    """
    blocks, mean = map(dit.get_submodule, refiner)
    if llm != 1:
        for block in blocks.children():
            block.register_forward_hook(_times(llm))
    if clip != 1:
        mean.register_forward_hook(_times(clip))


def _times(factor: float) -> Callable[[nn.Module, tuple[object, ...], Tensor], Tensor]:
    def multiplied(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> Tensor:
        return output * factor

    return multiplied
