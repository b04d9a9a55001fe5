"""Module paths of text encoders as Hugging Face publishes them, by which LoRA files name their modules."""

import re

# the paths of our own classes -> the published ones; a class of transformers has the published ones already
_PUBLISHED = (
    (r"encoder\.layers\.(\d+)\.(.+)", r"text_model.encoder.layers.\1.\2"),  # CLIP
    (r"blocks\.(\d+)\.attn\.([qkvo])", r"encoder.block.\1.layer.0.SelfAttention.\2"),  # T5
    (r"blocks\.(\d+)\.ffn\.gate\.0", r"encoder.block.\1.layer.1.DenseReluDense.wi_0"),
    (r"blocks\.(\d+)\.ffn\.fc1", r"encoder.block.\1.layer.1.DenseReluDense.wi_1"),
    (r"blocks\.(\d+)\.ffn\.fc2", r"encoder.block.\1.layer.1.DenseReluDense.wo"),
)


def published_path(path: str) -> str:
    """Return the published path of a module of a text encoder; an unknown path is one already."""
    for own, published in _PUBLISHED:
        found = re.fullmatch(own, path)
        if found is not None:
            return found.expand(published)
    return path
