"""Tiny random language models in every file layout: Qwen2.5-VL, Qwen3, Qwen3-VL and Mistral Small 3."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from tests.tiny.hunyuan_encoders import prefixed, save
from tests.tiny.wan_encoders import CORPUS, random_tensors

VOCABULARY, DIM, LAYERS = 600, 64, 4
QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
    *("<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
)
MISTRAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# what is written of a user's message, a system's and the beginning of an answer in Qwen3's chat template
QWEN3_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": DIM,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e6}
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 80,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": DIM,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
QWEN3_VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": DIM,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2, 3],
}
QWEN25_VL_TEXT = {**_TEXT, "rms_norm_eps": 1e-6}
QWEN3_CONFIG = {**_TEXT, "head_dim": 32, "rms_norm_eps": 1e-6, "rope_parameters": _ROPE}
QWEN35_TEXT = {
    **_TEXT,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MISTRAL_CONFIG = {
    **_TEXT,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {**_ROPE, "rope_theta": 1e9},
    "sliding_window": None,
}
# a short original length, so that the slowed frequencies show in a short text
MINISTRAL3_CONFIG = {
    **MISTRAL_CONFIG,
    "max_position_embeddings": 1024,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def filled(model: Any, seed: int = 5) -> Any:
    """A network of transformers with random weights that keep a signal at its size."""
    model.load_state_dict(random_tensors(model, seed))
    return model.eval()


def qwen3(layers: int = LAYERS, **sizes: int) -> Any:
    """The whole network, with its head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    told = {**QWEN3_CONFIG, "num_hidden_layers": layers, **sizes}
    return filled(Qwen3ForCausalLM(Qwen3Config(**told, tie_word_embeddings=False)))


def qwen25_vl(**rope: Any) -> Any:
    """The whole network with its vision tower and head; token ids are those of `qwen_tokenizer`.

    rope: changes of its rotary frequencies.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {name: qwen_tokenizer().token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    config = Qwen2_5_VLConfig(
        text_config={**QWEN25_VL_TEXT, "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3], **rope}},
        vision_config=dict(VISION),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
    )
    return filled(Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl(layers: int = LAYERS) -> Any:
    """The whole network with its vision tower and head; token ids are those of `qwen_tokenizer`."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = {name: qwen_tokenizer().token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    rope = {**_ROPE, "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**QWEN3_CONFIG, "num_hidden_layers": layers, "rope_parameters": rope},
        vision_config=dict(QWEN3_VISION),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
    )
    return filled(Qwen3VLForConditionalGeneration(config))


def qwen35(layers: int = LAYERS) -> Any:
    """Qwen3.5's whole network with its vision tower and head; of four layers the last one has attention."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    ids = {name: qwen_tokenizer().token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    rope = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    config = Qwen3_5Config(
        text_config={**QWEN35_TEXT, "num_hidden_layers": layers, "rope_parameters": rope},
        vision_config={**QWEN3_VISION, "deepstack_visual_indexes": []},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
    )
    model = filled(Qwen3_5ForConditionalGeneration(config))
    for name, parameter in model.named_parameters():
        # weights of norms are how far these are from 1, except the gated ones; exponents are not large
        if name.endswith("norm.weight") and "linear_attn" not in name and "visual" not in name:
            parameter.data -= 1
        if name.endswith(("A_log", "dt_bias")):
            parameter.data.mul_(0.5)
    return model


def mistral3(layers: int = LAYERS) -> Any:
    """The language model of Mistral Small 3 with its head."""
    from transformers import MistralConfig, MistralForCausalLM

    return filled(MistralForCausalLM(MistralConfig(**{**MISTRAL_CONFIG, "num_hidden_layers": layers})))


def ministral3(layers: int = LAYERS, **yarn: float) -> Any:
    """The language model of Ministral 3 with its head. yarn: changes of its rotary frequencies."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**{**MINISTRAL3_CONFIG, "num_hidden_layers": layers})
    config.rope_parameters = {**config.rope_parameters, **yarn}
    return filled(MistralForCausalLM(config))


def layouts(model: Any) -> dict[str, dict[str, Tensor]]:
    """The tensors of a network under the names that files have."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bare = {
        name.removeprefix("model.").removeprefix("language_model."): tensor for name, tensor in own.items()
    }
    head = {"lm_head.weight": bare.pop("lm_head.weight")}
    vision = {name: bare.pop(name) for name in list(bare) if name.startswith("visual.")}
    one = torch.ones(2)
    other = (
        {} if vision else {"vision_tower.patch_conv.weight": one, "multi_modal_projector.norm.weight": one}
    )
    return {
        "transformers 4": {**prefixed(bare, "model."), **vision, **head},
        "transformers 5": {
            **prefixed(bare, "model.language_model."),
            **prefixed({**vision, **other}, "model."),
            **head,
        },
        "old multimodal": {
            **prefixed(bare, "language_model.model."),
            **{f"language_model.{name}": tensor for name, tensor in head.items()},
            **vision,
            **other,
        },
        "bare": {**bare, **vision},
        "comfy": {**prefixed(bare, "model."), **vision, "tekken_model": torch.arange(9, dtype=torch.uint8)},
    }


def _tokenizer(special: tuple[str, ...], behind: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    own = [AddedToken(name, special=True, normalized=False) for name in special]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[] if behind else own,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if behind:
        tokenizer.add_special_tokens(own)
    return tokenizer


def qwen_tokenizer() -> Tokenizer:
    """Byte-level merges behind Qwen's cuts, its own tokens behind them."""
    return _tokenizer(QWEN_TOKENS, behind=True)


def mistral_tokenizer() -> Tokenizer:
    """Byte-level merges behind Qwen's cuts, Mistral's own tokens before them."""
    return _tokenizer(MISTRAL_TOKENS, behind=False)


def write_qwen_tokenizer(folder: Path, form: str = "tokenizer.json") -> Path:
    """Write tokenizer.json, or vocab.json with merges.txt. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = qwen_tokenizer()
    if form == "tokenizer.json":
        tokenizer.save(str(folder / form))
    else:
        tokenizer.model.save(str(folder))
    return folder


def write_mistral_tokenizer(folder: Path) -> Path:
    """Write tokenizer.json. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mistral_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def config_json(model: Any) -> dict[str, Any]:
    """The config.json that transformers write."""
    config: dict[str, Any] = model.config.to_dict()
    return config


def write_model(
    path: Path, model: Any, layout: str = "transformers 4", change: Mapping[str, Tensor | None] | None = None
) -> Path:
    """Write one file with config.json next to it. change: tensors to put in or, None, to omit."""
    tensors = {**layouts(model)[layout], **(change or {})}
    save(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    path.with_name("config.json").write_text(json.dumps(config_json(model)), encoding="utf-8")
    return path
