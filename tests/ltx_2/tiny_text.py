"""Tiny text parts of LTX-2 on disk: Gemma 3 and the connectors, in the released layouts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor

from tests.tiny.language_models import filled
from tests.tiny.wan_encoders import CORPUS

TEXT_DIM, TEXT_LAYERS = 32, 7  # the sixth layer sees all tokens, the others a window
TEXT_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>")
_SIZES = {
    f"{stream}_connector_{name}": value
    for stream in ("video", "audio")
    for name, value in {"num_attention_heads": 2, "num_layers": 2, "num_learnable_registers": 8}.items()
}
# version -> settings of diffusers' LTX2TextConnectors
CONNECTORS: dict[str, dict[str, Any]] = {
    "2.0": {**_SIZES, "video_connector_attention_head_dim": 16, "audio_connector_attention_head_dim": 16},
    "2.3": {
        **_SIZES,
        **{"video_connector_attention_head_dim": 12, "audio_connector_attention_head_dim": 8},
        **{"video_hidden_dim": 24, "audio_hidden_dim": 16, "per_modality_projections": True},
        **{"video_gated_attn": True, "audio_gated_attn": True, "proj_bias": True},
    },
}

CONNECTORS["2.5"] = CONNECTORS["2.3"]
GEMMA_VERSION = "gemma4-12b-ltx-v1"


def text_gemma_4(**settings: Any) -> Any:
    """The whole of Gemma 4 with what sees and hears. settings: of its text half."""
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    near, far = "sliding_attention", "full_attention"
    text = {
        **{"vocab_size": 400, "hidden_size": TEXT_DIM, "intermediate_size": 48, "head_dim": 16},
        **{"num_hidden_layers": TEXT_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"global_head_dim": 24, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        **{"sliding_window": 6, "layer_types": [near, near, far, near, near, near, far], **settings},
    }
    vision = {"mm_embed_dim": 16, "mm_posemb_size": 4, "patch_size": 2, "output_proj_dims": TEXT_DIM}
    config = Gemma4UnifiedConfig(text_config=text, vision_config=vision, audio_config={"audio_embed_dim": 8})
    return filled(Gemma4UnifiedForConditionalGeneration(config))


def text_write_gemma_4(path: Path, model: Any, connectors: Any, **told: Any) -> Path:
    """Write LTX-2.5's file: Gemma, projections, tokenizer. told: in its configuration. Returns the file."""
    named = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.language_model."):
            named[name.replace("language_model.", "")] = tensor.clone()
        elif name != "lm_head.weight":
            named[f"vision_model.{name.removeprefix('model.')}"] = tensor.clone()
    projections = text_official_names(connectors.state_dict())
    named |= {name: one for name, one in projections.items() if "aggregate_embed" in name}
    tokenizer = text_tokenizer()
    tokenizer.post_processor = processors.Sequence([])  # as released: <bos> is left to the reader
    for name, text in {"tokenizer_json": tokenizer.to_str(), "hf_asset__a.json": "{}"}.items():
        named[name] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    config = {**model.config.to_dict(), "gemma_version": GEMMA_VERSION, **told}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(named, path, {"gemma_config": json.dumps(config)})
    return path


def text_gemma(**settings: Any) -> Any:
    """The whole of Gemma 3 with a vision tower. settings: of its text half."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        **{"vocab_size": 400, "hidden_size": TEXT_DIM, "intermediate_size": 48, "head_dim": 16},
        **{"num_hidden_layers": TEXT_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"sliding_window": 6, "query_pre_attn_scalar": 24},
        **{"rope_scaling": {"rope_type": "linear", "factor": 8.0}, **settings},
    }
    vision = {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 28, "patch_size": 14},
    }
    return filled(Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)))


def text_gemma_layouts(model: Any) -> dict[str, dict[str, Tensor]]:
    """Gemma's tensors under the names that files have."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    bare = {name.removeprefix("model."): tensor for name, tensor in own.items()}
    text = {name: tensor for name, tensor in bare.items() if name.startswith("language_model.")}
    others = {name: tensor for name, tensor in bare.items() if name not in text}
    old = {name.replace("language_model.", "language_model.model."): tensor for name, tensor in text.items()}
    comfy = {name.replace("language_model.", "model."): tensor for name, tensor in text.items()}
    return {
        "google": {**old, **others},
        "transformers 5": own,
        "comfy": {
            **comfy,
            **{name.replace("vision_tower.", "vision_model."): tensor for name, tensor in others.items()},
        },
    }


def text_tokenizer() -> Tokenizer:
    """Byte-level merges; each text begins with <bos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=[AddedToken(name, special=True) for name in TEXT_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    begin = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[begin])
    return tokenizer


def text_write_gemma(folder: Path, model: Any, layout: str = "google", **others: Tensor) -> Path:
    """Write Gemma's folder: model, config.json, tokenizer. others: tensors besides. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**text_gemma_layouts(model)[layout], **others}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")
    text_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def text_connectors(version: str) -> Any:
    """The connectors of diffusers."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    told = {"caption_channels": TEXT_DIM, "text_proj_in_factor": TEXT_LAYERS + 1, "rope_type": "split"}
    return filled(LTX2TextConnectors(**told, **CONNECTORS[version]))


_OFFICIAL = (
    ("text_proj_in.", "aggregate_embed."),
    ("transformer_blocks", "transformer_1d_blocks"),
    ("norm_q", "q_norm"),
    ("norm_k", "k_norm"),
    ("_connector.", "_embeddings_connector."),
)


def text_official_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' tensors of the connectors under the names of the official file."""
    found = {}
    for name, tensor in tensors.items():
        for theirs, official in _OFFICIAL:
            name = name.replace(theirs, official)
        start = "text_embedding_projection." if "aggregate_embed" in name else "model.diffusion_model."
        found[start + name] = tensor.contiguous()
    return found


def official_record(connectors: Any, **more: Any) -> dict[str, str]:
    """The metadata of an official file with these connectors. more: settings besides."""
    told = connectors.config
    transformer = {
        "connector_num_attention_heads": told["video_connector_num_attention_heads"],
        "connector_positional_embedding_max_pos": [told["connector_rope_base_seq_len"]],
        "rope_type": told["rope_type"],
        **more,
    }
    return {"config": json.dumps({"transformer": transformer})}


def text_write_connectors(path: Path, model: Any, dialect: str = "official") -> Path:
    """Write the official file, with parts of other networks, or a release's folder."""
    tensors, told = model.state_dict(), dict(model.config)
    if dialect == "diffusers":
        folder = path / "connectors"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        told = {"_class_name": "LTX2TextConnectors", **told}
        (folder / "config.json").write_text(json.dumps(told, default=str), encoding="utf-8")
        return path
    others = {name: torch.ones(2) for name in ("vae.bias", "vocoder.bias", "model.diffusion_model.bias")}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**text_official_names(tensors), **others}, path, official_record(model))
    return path
