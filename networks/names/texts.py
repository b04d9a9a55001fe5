"""Names of the modules and parameters of text encoders; LoRA files have the published ones."""

import re

from networks.names.layouts import Numbering

Pairs = tuple[tuple[str, str], ...]  # (pattern, replacement)
# paths in our own classes -> published paths; classes of transformers already have the published ones
_PUBLISHED = (
    (r"encoder\.layers\.(\d+)\.(.+)", r"text_model.encoder.layers.\1.\2"),  # CLIP
    (r"embeddings\.(token|position)_embedding", r"text_model.embeddings.\1_embedding"),
    (r"final_layer_norm", r"text_model.final_layer_norm"),
    (r"blocks\.(\d+)\.attn\.([qkvo])", r"encoder.block.\1.layer.0.SelfAttention.\2"),  # T5
    (r"blocks\.(\d+)\.ffn\.gate\.0", r"encoder.block.\1.layer.1.DenseReluDense.wi_0"),
    (r"blocks\.(\d+)\.ffn\.fc1", r"encoder.block.\1.layer.1.DenseReluDense.wi_1"),
    (r"blocks\.(\d+)\.ffn\.fc2", r"encoder.block.\1.layer.1.DenseReluDense.wo"),
)


def _translate(table: Pairs, name: str) -> str | None:
    """Rename with the first matching pattern of a table; return None if no pattern matches."""
    for pattern, replacement in table:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(replacement)
    return None


def published_path(path: str) -> str:
    """Return the published path of our text encoder's module; return other paths unchanged."""
    return _translate(_PUBLISHED, path) or path


def published_parameter(name: str) -> str:
    """Return the name that published checkpoints use for our name of a text encoder's parameter."""
    path, _, leaf = name.rpartition(".")
    return f"{published_path(path)}.{leaf}".lstrip(".")


# OpenCLIP's names -> Hugging Face's, below `text_model.`
_OPEN_CLIP = (
    (r"token_embedding\.weight", "embeddings.token_embedding.weight"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"ln_final\.(\w+)", r"final_layer_norm.\1"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"encoder.layers.\1.mlp.fc2.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
)
# rows of q, then k, then v
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def open_clip_names(name: str) -> list[tuple[str, int | None]]:
    """Return the Hugging Face parameters that a tensor of OpenCLIP's text encoder contains.

    Args:
        name: Name of the tensor.

    Returns:
        Pairs of Hugging Face's name, without `text_model.`, and which third of the rows (0 to 2) contains the
        parameter, or None for all rows. [] for unknown tensors.
    """
    fused = _FUSED.fullmatch(name)
    if fused is not None:
        layer = f"encoder.layers.{fused[1]}.self_attn."
        return [(f"{layer}{x}_proj.{fused[2]}", third) for third, x in enumerate("qkv")]
    translated = _translate(_OPEN_CLIP, name)
    return [] if translated is None else [(translated, None)]


# Layer that projects the pooled state in some CLIPs; it is outside `text_model`. OpenCLIP has its transposed
# weight as a parameter
TEXT_PROJECTION = "text_projection"
# names of modules in LoRA files -> their paths in diffusers' pipelines
_CLIP_LAYER = r"_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)"
_IN_DIFFUSERS = (
    (f"lora_te1?{_CLIP_LAYER}", r"text_encoder.text_model.encoder.layers.\1.\2.\3"),
    (f"lora_te2{_CLIP_LAYER}", r"text_encoder_2.text_model.encoder.layers.\1.\2.\3"),
    (f"lora_te2_{TEXT_PROJECTION}", f"text_encoder_2.{TEXT_PROJECTION}"),
    (
        r"lora_te3_encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_(\w+)",
        r"text_encoder_2.encoder.block.\1.layer.\2.\3.\4",
    ),
)


def find_diffusers_text_path(name: str) -> str | None:
    """Return the path of our text encoder module in diffusers; None if diffusers lacks the module."""
    return _translate(_IN_DIFFUSERS, name)


# names of a language model's modules in LoRA files, after the text encoder's prefix -> their paths
_IN_LANGUAGE_MODEL = (
    (r"layers_(\d+)_(self_attn|mlp)_(\w+)", r"layers.\1.\2.\3"),
    (r"layers_(\d+)_(\w+)", r"layers.\1.\2"),  # norms
    (r"(embed_tokens|norm)", r"\1"),
)


def find_comfyui_text_path(name: str, starts: Pairs) -> str | None:
    """Return the path of a text encoder's module in ComfyUI; None if ComfyUI reads our name.

    Args:
        name: Our name of the module.
        starts: Pairs of our prefix and ComfyUI's prefix for the family's text encoders.
    """
    for our_prefix, comfyui_prefix in starts:
        if not name.startswith(our_prefix):
            continue
        path = _translate(_IN_LANGUAGE_MODEL, name.removeprefix(our_prefix))
        if path is not None:
            return f"{comfyui_prefix}{path}"
    return None


# order of the modules of CLIP-L, T5 and Gemma 2 in optimizer states, where they precede the transformer's
TEXTS_NUMBERED: Numbering = (
    (
        "lora_te1.text_model.encoder.layers.{n}.",
        "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj mlp.fc1 mlp.fc2",
    ),
    (
        "lora_te3.encoder.block.{n}.",
        "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v layer.0.SelfAttention.o "
        "layer.1.DenseReluDense.wi_0 layer.1.DenseReluDense.wi_1 layer.1.DenseReluDense.wo",
    ),
    (
        "lora_te.layers.{n}.",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "mlp.gate_proj mlp.up_proj mlp.down_proj",
    ),
)
