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


# names of modules in LoRA files -> their paths in diffusers' pipelines
_IN_DIFFUSERS = (
    (
        r"lora_te1?_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)",
        r"text_encoder.text_model.encoder.layers.\1.\2.\3",
    ),
    (
        r"lora_te2_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)",
        r"text_encoder_2.text_model.encoder.layers.\1.\2.\3",
    ),
    (
        r"lora_te3_encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_(\w+)",
        r"text_encoder_2.encoder.block.\1.layer.\2.\3.\4",
    ),
)


def diffusers_path_of_text(name: str) -> str | None:
    """Return the path of a text encoder's module in diffusers' pipelines, None if they have none."""
    for ours, theirs in _IN_DIFFUSERS:
        found = re.fullmatch(ours, name)
        if found is not None:
            return found.expand(theirs)
    return None
