"""`--te_multiplier`: scale the text's weight inside a loaded transformer, from outside."""

from collections.abc import Callable

from torch import Tensor, nn

# modules of a token refiner: the list of its blocks, and the projection of the text's mean to a vector
HUNYUAN_REFINER = ("txt_in.individual_token_refiner.blocks", "txt_in.c_embedder")
FRAMEPACK_REFINER = (
    "context_embedder.token_refiner.refiner_blocks",
    "context_embedder.time_text_embed.text_embedder",
)


def multiply_text(dit: nn.Module, refiner: tuple[str, str], llm: float, clip: float) -> None:
    """Scale the outputs of the token refiner from now on. refiner: one of the constants above.

    llm: factor for the output of each refiner block; as blocks follow one another, the factors multiply.
    clip: factor for the vector of the text's mean from which the gates are made. Despite the option's name
    that vector comes from the language model too (CLIP's goes past the refiner).
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
