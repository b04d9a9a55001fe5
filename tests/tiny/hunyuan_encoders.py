"""Tiny random text encoders of HunyuanVideo in every file layout, and tokenizers trained on a few
sentences.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor

from checkpoints.filling import on_meta_device
from encoders.clip_checkpoints import ClipTextConfig
from encoders.clip_layers import ClipText
from encoders.language_models import LanguageConfig, build_language_model
from hunyuan_model.text_encoders import VIDEO_TEMPLATE, PromptTemplate
from tests.tiny.dit_files import write_tensors
from tests.tiny.wan_encoders import CORPUS, random_tensors

LLM_DIM = 128  # width of the language model's states
CLIP_DIM = 64  # width of CLIP's pooled state
LLAMA_LAYERS = 4
LLAMA_VOCABULARY, CLIP_VOCABULARY = 640, 704  # rows of the tables, a few more than there are tokens
# how Llama 3 cuts a text before merging
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IMAGE_TEMPLATE = PromptTemplate(
    "Describe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:",
    crop_start=36,
)
LLAMA_SPECIAL = (
    *(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<image>",
        "<pad>",
    ),
)

# Weights


def llama_config(
    heads: int = 2, kv_heads: int = 1, head_width: int = 128, layers: int = LLAMA_LAYERS
) -> LanguageConfig:
    """A whole model, final norm included; its attention is wider than the model, which the released one's is
    not.
    """
    return LanguageConfig(
        LLAMA_VOCABULARY, LLM_DIM, 192, heads, kv_heads, head_width, layers, final_norm=True
    )


def clip_text_config(dim: int = CLIP_DIM) -> ClipTextConfig:
    return ClipTextConfig(CLIP_VOCABULARY, 77, dim, 2 * dim, dim // 64, num_layers=2)


def llama_tensors(
    seed: int = 3, dtype: torch.dtype = torch.float32, config: LanguageConfig | None = None
) -> dict[str, Tensor]:
    """A language model with the names of the bare LlamaModel."""
    with on_meta_device():
        network = build_language_model(config or llama_config())
    return {name: tensor.to(dtype) for name, tensor in random_tensors(network, seed).items()}


def clip_text_tensors(
    seed: int = 4, dtype: torch.dtype = torch.float32, dim: int = CLIP_DIM
) -> dict[str, Tensor]:
    """A text tower with the names of the bare module."""
    with torch.device("meta"):
        network = ClipText(clip_text_config(dim))
    return {name: tensor.to(dtype) for name, tensor in random_tensors(network, seed).items()}


def prefixed(tensors: Mapping[str, Tensor], prefix: str, **others: Tensor) -> dict[str, Tensor]:
    """The same tensors under longer names, and others."""
    return {**{prefix + name: tensor for name, tensor in tensors.items()}, **others}


def llama_layouts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The language model as the published files name it."""
    one, head = torch.ones(2), torch.ones(LLAMA_VOCABULARY, LLM_DIM)
    vision = {
        "multi_modal_projector.linear_1.weight": one,
        "vision_tower.vision_model.embeddings.class_embedding": one,
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": one,
    }
    causal = prefixed(tensors, "model.", **{"lm_head.weight": head})
    return {
        "bare": dict(tensors),
        "causal": causal,
        "comfy": {**causal, "tokenizer": torch.arange(9, dtype=torch.uint8)},
        "llava": {
            **prefixed(tensors, "language_model.model."),
            "language_model.lm_head.weight": head,
            **vision,
        },
        "new llava": {
            **prefixed(tensors, "model.language_model."),
            **prefixed(vision, "model."),
            "lm_head.weight": head,
        },
        "old": {**causal, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(64)},
        "all in one": {
            **prefixed(tensors, "text_encoders.llama.transformer.model."),
            "text_encoders.llama.transformer.lm_head.weight": head,
            "text_encoders.llama.transformer.scaled_fp8": torch.empty(0),
            "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": one,
            "model.diffusion_model.img_in.proj.weight": one,
            "vae.encoder.conv_in.conv.weight": one,
        },
    }


def clip_text_layouts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The text tower as the published files name it."""
    one = torch.ones(2)
    plain = prefixed(tensors, "text_model.")
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    return {
        "bare": dict(tensors),
        "text": plain,
        "sd3": {**plain, "text_projection.weight": one, "logit_scale": torch.tensor(2.0)},
        "both": {
            **plain,
            **positions,
            "logit_scale": torch.tensor(2.0),
            "text_projection.weight": one,
            "visual_projection.weight": one,
            "vision_model.embeddings.class_embedding": one,
            "vision_model.encoder.layers.0.self_attn.q_proj.weight": one,
        },
        "all in one": {
            **prefixed(plain, "text_encoders.clip_l.transformer."),
            "text_encoders.llama.transformer.model.embed_tokens.weight": one,
            "model.diffusion_model.img_in.proj.weight": one,
            "vae.encoder.conv_in.conv.weight": one,
        },
    }


def scaled_fp8(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A text encoder as ComfyUI stores it in fp8, layers only, and the weights that it stands for."""
    stored, meant = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix(".weight") + ".scale_weight"] = scale
            meant[name] = stored[name].float() * scale
        else:
            stored[name] = tensor.to(torch.float16)
            meant[name] = stored[name].float()
    return stored, meant


# Configurations, as transformers write them


def llama_config_json(config: LanguageConfig | None = None) -> dict[str, object]:
    """The config.json of a LlamaForCausalLM."""
    config = config or llama_config()
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.eps,
        "rope_theta": config.theta,
        "vocab_size": config.vocabulary,
    }


def clip_config_json(config: ClipTextConfig | None = None) -> dict[str, object]:
    """The config.json of a CLIP with both towers."""
    config = config or clip_text_config()
    text = {
        "model_type": "clip_text_model",
        "hidden_size": config.dim,
        "num_attention_heads": config.num_heads,
        "hidden_act": config.activation,
        "layer_norm_eps": config.eps,
        "eos_token_id": 2,
    }
    return {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": text}


# Tokenizers


def llama_tokenizer(adds_begin: bool = True) -> Tokenizer:
    """Byte-level merges behind Llama 3's cuts.

    Like the real one it makes 95 and 36 tokens of the templates' beginnings.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=LLAMA_VOCABULARY - 10,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in LLAMA_SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    templates = [template.text for template in (VIDEO_TEMPLATE, IMAGE_TEMPLATE)]
    tokenizer.train_from_iterator([*templates * 4, *CORPUS], trainer)
    if adds_begin:
        begin = LLAMA_SPECIAL[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, 0)]
        )
    return tokenizer


def write_llama_tokenizer(folder: Path, adds_begin: bool = True) -> None:
    """`folder` as the folder tokenizer of a HunyuanVideo pipeline."""
    folder.mkdir(parents=True, exist_ok=True)
    llama_tokenizer(adds_begin).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": LLAMA_SPECIAL[0],
        "pad_token": LLAMA_SPECIAL[-1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_clip_tokenizer(folder: Path) -> None:
    """`folder` as the folder tokenizer_2: vocab.json and merges.txt. The end token has the highest number."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for text in CORPUS for word in re.findall("[a-z]+", text.lower())})[:45]
    merges = [
        (word[:end], word[end] + "</w>" * (end == len(word) - 1))
        for word in words
        for end in range(1, len(word))
    ]
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [
        *characters,
        *(character + "</w>" for character in characters),
        *(one + two for one, two in merges),
    ]
    names = list(dict.fromkeys([*names, "<|startoftext|>", "<|endoftext|>"]))
    assert len(names) <= CLIP_VOCABULARY, len(names)
    vocabulary = {name: index for index, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *dict.fromkeys(f"{one} {two}" for one, two in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}', encoding="utf-8")


# Files

save = write_tensors


def save_sharded(folder: Path, tensors: Mapping[str, Tensor], shards: int = 2) -> None:
    """Tensors in several files with their index, as transformers save a large model."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    files = {
        f"model-{index + 1:05d}-of-{shards:05d}.safetensors": names[index::shards] for index in range(shards)
    }
    for file, part in files.items():
        save(folder / file, {name: tensors[name] for name in part})
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8"
    )


def write_text_encoders(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """The folders text_encoder and text_encoder_2 of the official release, tokenizers inside.

    Returns their paths as text_encoder1, text_encoder2.
    """
    paths = {"text_encoder1": folder / "text_encoder", "text_encoder2": folder / "text_encoder_2"}
    save_sharded(paths["text_encoder1"], llama_layouts(llama_tensors(dtype=dtype))["causal"])
    write_llama_tokenizer(paths["text_encoder1"])
    write_clip_tokenizer(paths["text_encoder2"])
    save(
        paths["text_encoder2"] / "model.safetensors",
        clip_text_layouts(clip_text_tensors(dtype=dtype))["both"],
    )
    for path, config in zip(paths.values(), (llama_config_json(), clip_config_json()), strict=True):
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return paths


def write_comfy_text_encoders(folder: Path) -> dict[str, Path]:
    """The two as ComfyUI's single files, the same weights; their tokenizers in folders beside them.

    Returns their paths as text_encoder1, text_encoder2, text_encoder1_tokenizer, text_encoder2_tokenizer.
    """
    paths = {
        "text_encoder1": folder / "llava_llama3_fp16.safetensors",
        "text_encoder2": folder / "clip_l.safetensors",
        "text_encoder1_tokenizer": folder / "tokenizer",
        "text_encoder2_tokenizer": folder / "tokenizer_2",
    }
    write_llama_tokenizer(paths["text_encoder1_tokenizer"])
    write_clip_tokenizer(paths["text_encoder2_tokenizer"])
    save(paths["text_encoder1"], llama_layouts(llama_tensors())["comfy"])
    save(paths["text_encoder2"], clip_text_layouts(clip_text_tensors())["text"])
    return paths
