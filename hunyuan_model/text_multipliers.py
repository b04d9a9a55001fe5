"""`--te_multiplier`: the text weighs more or less inside the transformer. Acts on a loaded transformer from outside."""

from collections.abc import Callable

from torch import Tensor, nn


def multiply_text(dit: nn.Module, llm: float, clip: float) -> None:
    """Multiply what the token refiner makes of the text, from now on.

    llm: the output of each of its blocks, so a block sees what the one before gives times llm. clip: the vector of the text's mean
    that its gates are made from; despite the option's name that is the language model's too (CLIP's enters at `vector_in`).
    """
    if llm != 1:
        for block in dit.get_submodule("txt_in.individual_token_refiner.blocks").children():
            block.register_forward_hook(_times(llm))
    if clip != 1:
        dit.get_submodule("txt_in.c_embedder").register_forward_hook(_times(clip))


def _times(factor: float) -> Callable[[nn.Module, tuple[object, ...], Tensor], Tensor]:
    def multiplied(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> Tensor:
        return output * factor

    return multiplied
