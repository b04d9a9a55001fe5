"""Tiny vision-language models on disk, in the layout of transformers."""

import json
from pathlib import Path
from typing import Any

import torch

SPECIAL = ["<unk>", "</s>", "<image>", "<pad>", "<user>", "<model>", "<system>", "<s>"]
SPECIAL += ["<vision>", "</vision>", "<video>"]
WORDS = ["a", "red", "blue", "cat", "dog", "walks", "runs", "on", "the", "grass", "in", "light"]
VOCABULARY = [*SPECIAL, *WORDS]
TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}> {% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %} <image> {% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}<model> "
)


def write_llava(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Write a LLaVA with random weights that says words of WORDS, and return the folder."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=16),
        text_config=transformers.LlamaConfig(**_text()),
        image_token_index=VOCABULARY.index("<image>"),
        vision_feature_layer=-1,
    )
    _save(transformers.LlavaForConditionalGeneration(config), folder)
    return folder


def write_qwen(folder: Path) -> Path:
    """Write a Qwen2-VL, whose processor also has a part for videos, and return the folder."""
    import transformers

    template = TEMPLATE.replace(" <image> ", " <vision> <image> </vision> ")
    _tokenizer().save_pretrained(folder)
    processor: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 64,
        "max_pixels": 4096,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    config = transformers.Qwen2VLConfig(
        text_config=_text() | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={
            **{"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
            **{"spatial_merge_size": 2, "mlp_ratio": 2},
        },
        image_token_id=VOCABULARY.index("<image>"),
        video_token_id=VOCABULARY.index("<video>"),
        vision_start_token_id=VOCABULARY.index("<vision>"),
        vision_end_token_id=VOCABULARY.index("</vision>"),
    )
    _save(transformers.Qwen2VLForConditionalGeneration(config), folder)
    return folder


def write_git(folder: Path) -> Path:
    """Write a GIT, which takes an image and no text, and return the folder."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = transformers.GitProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), _tokenizer()
    )
    processor.save_pretrained(folder)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {**_text(), "max_position_embeddings": 64}
    config = transformers.GitConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, **sizes)
    _save(transformers.GitForCausalLM(config), folder)
    return folder


def _text() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(VOCABULARY), "bos_token_id": 7, "eos_token_id": 1, "pad_token_id": 3}
    return {**sizes, **tokens, "num_key_value_heads": 2, "max_position_embeddings": 2048}


def _tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(SPECIAL)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", VOCABULARY.index("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )


def _save(model: Any, folder: Path) -> None:
    """Save a model whose answers never hold a special token, and depend on the picture visibly."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (1.0 if weight.ndim > 1 else 0.1))
    model.generation_config.suppress_tokens = list(range(len(SPECIAL)))
    model.save_pretrained(folder)
