"""Run the layers of a language model under a causal mask and collect hidden states."""
# Letters: B prompts, L tokens, C width of the model, n states that are joined

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from encoders.language_models import FULL_ATTENTION, LINEAR_ATTENTION, SLIDING_ATTENTION, all_states


def _collect_states(
    hooks: contextlib.ExitStack, layers: Any, states: Sequence[int], embeddings: Tensor
) -> list[Tensor]:
    """Return a list to which hooks add these states in the next forward pass; state 0 is in it already."""
    collected: list[Tensor] = []
    for state in states:
        if state == 0:
            collected.append(embeddings)
        else:
            append_state = functools.partial(_append_output, collected)
            hooks.callback(layers[state - 1].register_forward_hook(append_state).remove)
    return collected


def language_states(
    network: nn.Module,
    embeddings: Tensor,
    mask: Tensor,
    states: Sequence[int] = (-1,),
    position_ids: Tensor | None = None,
    layer_additions: Sequence[Tensor] = (),
) -> Tensor:
    """Run a language model and return n of its hidden states, concatenated along channels: B L nC.

    Forward hooks collect all states but the last one, which is the network's output. Padding tokens attend
    to the real tokens before them, as in the released pipelines.

    Args:
        network: The language model, loaded with its layers up to the last of `states`.
        embeddings: Embeddings of the tokens, B L C.
        mask: 1 for real tokens, B L.
        states: Indices of the states to return, ascending: n is the state after n layers, and -1 the last
            one after the final norm; () for all.
        position_ids: Time, row and column of each token, 3 B L on the CPU; None for 0, 1, 2, ...
        layer_additions: Image features, each B L C. The n-th is added to the output of the n-th layer, after
            the state of that layer was collected (DeepStack).
    """
    layers: Any = network.layers
    states = states or all_states(len(layers))
    if position_ids is None:
        position_ids = torch.arange(embeddings.shape[1])[None]
    masks = _make_attention_masks(network.config, embeddings, mask)
    # a layer's state is its output before the addition; only -1 includes the last layer's addition
    layers_with_addition = layers if states[-1] == -1 else layers[:-1]
    with contextlib.ExitStack() as hooks:
        collected = _collect_states(hooks, layers, states[:-1], embeddings)
        for layer, addition in zip(layers_with_addition, layer_additions, strict=False):
            add = functools.partial(_add_to_output, addition)
            hooks.callback(layer.register_forward_hook(add).remove)
        output = network(
            inputs_embeds=embeddings,
            attention_mask=masks if len(masks) > 1 else masks[FULL_ATTENTION],
            position_ids=position_ids,
            use_cache=False,
        )
    last: Tensor = output.last_hidden_state
    return torch.cat([*collected, last], dim=-1) if collected else last


def _make_attention_masks(config: Any, embeddings: Tensor, mask: Tensor) -> dict[str, Tensor | None]:
    """Return the attention masks by kind of layer."""
    # Full and sliding attention take a mask of queries by keys, B 1 L L. Linear attention takes the padding
    # mask B L, or None if all tokens are real. `embeddings` is B L C, `mask` is B L.
    length = embeddings.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    masks = {FULL_ATTENTION: causal & mask.bool()[:, None, None, :]}
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    if window is not None and SLIDING_ATTENTION in kinds:
        # a token attends to itself and to the `window - 1` tokens before it
        masks[SLIDING_ATTENTION] = masks[FULL_ATTENTION] & torch.ones_like(causal).triu(1 - int(window))
    if config._attn_implementation == "eager":  # this implementation adds the mask to the attention scores
        lowest = torch.finfo(embeddings.dtype).min
        for kind, attended in masks.items():
            masks[kind] = embeddings.new_zeros(attended.shape).masked_fill(~attended, lowest)
    if LINEAR_ATTENTION not in kinds:
        return dict(masks)
    return {**masks, LINEAR_ATTENTION: None if bool(mask.all()) else mask.bool()}


# Forward hooks. In transformers 4, the output of a layer is a tuple that begins with its states


def _add_to_output(addend: Tensor, layer: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output + addend
    return (output[0] + addend, *output[1:])


def _append_output(outputs: list[Tensor], layer: nn.Module, inputs: Any, output: Any) -> None:
    outputs.append(output if isinstance(output, Tensor) else output[0])
