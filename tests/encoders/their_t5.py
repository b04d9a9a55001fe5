"""transformers' T5, umT5 and ByT5 of the sizes of ours."""

from typing import Any

from torch import Tensor
from transformers import T5Config as TheirConfig
from transformers import T5EncoderModel

from encoders.t5_network import T5Config

SAME = "encoder.embed_tokens.weight"  # as shared.weight


def their_t5(
    config: T5Config, tensors: dict[str, Tensor], network: Any = T5EncoderModel, settings: Any = TheirConfig
) -> Any:
    """Return their network with these weights, frozen."""
    there = network(
        settings(
            vocab_size=config.vocabulary,
            d_model=config.dim,
            d_kv=config.attention_dim // config.num_heads,
            d_ff=config.ffn_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            feed_forward_proj="gated-gelu",
        )
    )
    missing, unexpected = there.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {SAME}
    return there.eval().requires_grad_(False)
