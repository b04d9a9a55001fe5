"""States of language models: run the layers under a causal mask and keep what they give."""
# Letters: B prompts, L tokens, C width of the model, n states that are joined

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from encoders.language_models import FAR, NEAR, all_states


def language_states(
    network: nn.Module,
    tokens: Tensor,
    mask: Tensor,
    states: Sequence[int] = (-1,),
    places: Tensor | None = None,
    added: Sequence[Tensor] = (),
) -> Tensor:
    """Run the layers and return the states that are read, joined: B L nC.

    tokens: embeddings, B L C. mask: B L, 1 for real tokens. States of padding are computed from the real
    tokens before them, as in the released pipelines. states: as the network was loaded with. places:
    positions of the tokens, 3 B L on the CPU; None: 0, 1, 2, ... added: each B L C, added to the outputs of
    the first layers in turn, after their states are read.
    """
    length = tokens.shape[1]
    places = torch.arange(length)[None] if places is None else places
    layers: Any = network.layers
    states = states or all_states(len(layers))
    kept = [tokens] if states[0] == 0 and len(states) > 1 else []
    # which keys each query attends to, B 1 L L: for all layers, or for each kind of layers
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    masks = {FAR: causal & mask.bool()[:, None, None, :]}
    config: Any = network.config
    window = getattr(config, "sliding_window", None)
    if window is not None and NEAR in (getattr(config, "layer_types", None) or ()):
        masks[NEAR] = masks[FAR] & torch.ones_like(causal).triu(1 - int(window))
    if config._attn_implementation == "eager":  # adds it to the scores
        least = torch.finfo(tokens.dtype).min
        masks = {kind: tokens.new_zeros(one.shape).masked_fill(~one, least) for kind, one in masks.items()}
    hooks = [
        layers[state - 1].register_forward_hook(functools.partial(_keep, kept))
        for state in states[len(kept) : -1]
    ]
    behind = layers if states[-1] == -1 else layers[:-1]  # nothing follows the last state that is read
    hooks += [
        layer.register_forward_hook(functools.partial(_add, more))
        for layer, more in zip(behind, added, strict=False)
    ]
    try:
        found = network(
            inputs_embeds=tokens,
            attention_mask=masks if NEAR in masks else masks[FAR],
            position_ids=places,
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    last: Tensor = found.last_hidden_state
    return torch.cat([*kept, last], dim=-1) if kept else last


def _add(more: Tensor, layer: nn.Module, inputs: Any, output: Any) -> Any:
    return output + more if isinstance(output, Tensor) else (output[0] + more, *output[1:])


def _keep(kept: list[Tensor], layer: nn.Module, inputs: Any, output: Any) -> None:
    kept.append(output if isinstance(output, Tensor) else output[0])
