"""States of language models: run the layers under a causal mask and keep what they give."""
# Letters: B prompts, L tokens, C width of the model, n states that are joined

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from encoders.language_models import CARRIED, FAR, NEAR, all_states


def language_states(
    network: nn.Module,
    tokens: Tensor,
    mask: Tensor,
    states: Sequence[int] = (-1,),
    places: Tensor | None = None,
    added: Sequence[Tensor] = (),
) -> Tensor:
    """Run the layers and return the states that are read, joined: B L nC.

    `tokens` are embeddings, B L C. `mask` is B L, 1 for real tokens. States of padding are computed from the
    real tokens before them, as in the released pipelines. `states` are those that the network was loaded
    with. `places` is the positions of the tokens, 3 B L on the CPU; None means 0, 1, 2, ... `added` are each
    B L C, added to the outputs of the first layers in turn, after their states are read.
    """
    layers: Any = network.layers
    states = states or all_states(len(layers))
    places = torch.arange(tokens.shape[1])[None] if places is None else places
    masks = _make_attention_masks(network.config, tokens, mask)
    earlier_states = [tokens] if states[0] == 0 and len(states) > 1 else []
    hooks = []
    for state in states[len(earlier_states) : -1]:
        append_state = functools.partial(_append_output, earlier_states)
        hooks.append(layers[state - 1].register_forward_hook(append_state))
    changed_layers = layers if states[-1] == -1 else layers[:-1]  # nothing follows the last state
    for layer, addend in zip(changed_layers, added, strict=False):
        hooks.append(layer.register_forward_hook(functools.partial(_add_to_output, addend)))
    try:
        output = network(
            inputs_embeds=tokens,
            attention_mask=masks if len(masks) > 1 else masks[FAR],
            position_ids=places,
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    last: Tensor = output.last_hidden_state
    return torch.cat([*earlier_states, last], dim=-1) if earlier_states else last


def _make_attention_masks(config: Any, tokens: Tensor, mask: Tensor) -> dict[str, Tensor | None]:
    """Return attention masks B 1 L L, queries by keys: for all layers (FAR), or for each kind of layers.

    Layers that carry a state along have the mask itself, or None if all tokens are real.

    `tokens` is B L C. `mask` is B L.
    """
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    masks = {FAR: causal & mask.bool()[:, None, None, :]}
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    if window is not None and NEAR in kinds:
        masks[NEAR] = masks[FAR] & torch.ones_like(causal).triu(1 - int(window))
    if config._attn_implementation == "eager":  # adds it to the scores
        least = torch.finfo(tokens.dtype).min
        for kind, attended in masks.items():
            masks[kind] = tokens.new_zeros(attended.shape).masked_fill(~attended, least)
    if CARRIED not in kinds:
        return dict(masks)
    return {**masks, CARRIED: None if bool(mask.all()) else mask.bool()}


def _add_to_output(addend: Tensor, layer: nn.Module, inputs: Any, output: Any) -> Any:
    return output + addend if isinstance(output, Tensor) else (output[0] + addend, *output[1:])


def _append_output(outputs: list[Tensor], layer: nn.Module, inputs: Any, output: Any) -> None:
    outputs.append(output if isinstance(output, Tensor) else output[0])
