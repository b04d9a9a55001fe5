"""Names of the modules and parameters of text encoders: LoRA files have published paths."""

import re

from networks.names.layouts import Numbering

Pairs = tuple[tuple[str, str], ...]  # (a pattern, the name that it stands for)
# the paths of our own classes -> the published ones; a class of transformers has the published ones already
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
    """Return the name that the first fitting pattern of a table stands for; None if none fits."""
    for pattern, target in table:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(target)
    return None


def published_path(path: str) -> str:
    """Return the published path of a text encoder's module; unknown paths are published ones already."""
    return _translate(_PUBLISHED, path) or path


def published_parameter(name: str) -> str:
    """Return the published name of a text encoder's parameter."""
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
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")  # q, k and v by rows


def open_clip_names(name: str) -> list[tuple[str, int | None]]:
    """Return the parameters that a tensor of OpenCLIP's text encoder holds.

    Args:
        name: Name of the tensor.

    Returns:
        Pairs of Hugging Face's name, below `text_model.`, and the third of the rows that holds the parameter
        (None for all rows); [] for unknown tensors.
    """
    fused = _FUSED.fullmatch(name)
    if fused is not None:
        layer = f"encoder.layers.{fused[1]}.self_attn."
        return [(f"{layer}{x}_proj.{fused[2]}", third) for third, x in enumerate("qkv")]
    translated = _translate(_OPEN_CLIP, name)
    return [] if translated is None else [(translated, None)]


# of the pooled state, in CLIPs that project it: a layer next to `text_model`, of which OpenCLIP has the
# transposed weight as a parameter
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


def diffusers_path_of_text(name: str) -> str | None:
    """Return the path of a text encoder's module in diffusers pipelines; None if it has none."""
    return _translate(_IN_DIFFUSERS, name)


# names of a language model's modules in LoRA files, behind the text encoder's start -> their paths
_IN_LANGUAGE_MODEL = (
    (r"layers_(\d+)_(self_attn|mlp)_(\w+)", r"layers.\1.\2.\3"),
    (r"layers_(\d+)_(\w+)", r"layers.\1.\2"),  # norms
    (r"(embed_tokens|norm)", r"\1"),
)


def comfyui_path_of_text(name: str, starts: Pairs) -> str | None:
    """Return the path of a text encoder's module in ComfyUI; None if ComfyUI reads our name.

    Args:
        name: Path of the module.
        starts: Pairs of our prefix and ComfyUI's prefix for the family's text encoders.
    """
    for ours, theirs in starts:
        path = _translate(_IN_LANGUAGE_MODEL, name.removeprefix(ours)) if name.startswith(ours) else None
        if path is not None:
            return f"{theirs}{path}"
    return None


# order of the modules, which come before the transformer's: CLIP-L, T5, Gemma 2
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
