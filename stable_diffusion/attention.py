"""Attention of a U-Net with the back end that a training chooses, instead of diffusers' own."""
# Letters: B images, L query tokens, S key tokens, N heads, D head width, C = N * D

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modules.attention.attend import attend
from modules.speed_options import AttentionChoice


@dataclass(frozen=True)
class ChosenAttention:
    """Diffusers attention processor with the attention implementation that the user selected."""

    choice: AttentionChoice

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """Return the attention's output, B L C.

        Args:
            attn: Attention module of diffusers, which calls this with these argument names.
            hidden_states: States of the image, B L C.
            encoder_hidden_states: States of a text, B S C'; None for self-attention.
            attention_mask: Always None: these U-Nets have no masks.
        """
        assert attention_mask is None
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (attn.heads, -1)
        query = attn.to_q(hidden_states).unflatten(-1, heads)  # B L N D
        key = attn.to_k(context).unflatten(-1, heads)  # B S N D
        value = attn.to_v(context).unflatten(-1, heads)
        output = attend(query, key, value, self.choice).flatten(2)
        projection, dropout = attn.to_out
        result: Tensor = dropout(projection(output.to(query.dtype)))
        return result
