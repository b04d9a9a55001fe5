"""HunyuanImage's text encoders against recorded vectors: template, tokens, states, glyph texts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_image.text_encoders import (
    AFTER,
    BEFORE,
    DROPPED,
    GlyphTextEncoder,
    QwenTextEncoder,
    find_quoted,
    glyph_text,
)
from modules.contract.data import Conditions
from modules.contract.requests import Prompt
from modules.errors import CheckpointError
from tests.golden_cases import make_weights, read_case
from tests.tiny.hunyuan_encoders import llama_config, llama_tensors, prefixed, save
from tests.tiny.hunyuan_image import byt5_state, qwen_config, qwen_layouts, qwen_state, write_qwen

CPU = torch.device("cpu")
CASE, TENSORS = read_case("hunyuan_image_text")


def encode(encoder: QwenTextEncoder | GlyphTextEncoder, *prompts: str | Prompt) -> list[Conditions]:
    encoder.load(CPU)
    with torch.inference_mode():
        return encoder.encode([Prompt(one) if isinstance(one, str) else one for one in prompts])


def golden_qwen(folder: Path) -> QwenTextEncoder:
    model = CASE["models"]["text_encoder"]
    weights = make_weights(model["weights_model_key"], model["weights"], CASE["salt"])
    save(folder / "model.safetensors", weights)
    names = ("hidden_size", "num_attention_heads", "rms_norm_eps", "rope_theta")
    told = {name: model["config"][name] for name in names}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **told}), encoding="utf-8")
    tokenizer = json.dumps(CASE["tokenizers"]["text_encoder"])
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return QwenTextEncoder(folder, torch.float32)


def test_states_of_the_language_model_equal_the_recorded_ones(tmp_path: Path) -> None:
    found = encode(golden_qwen(tmp_path), *CASE["prompts"])

    assert f"{BEFORE}{{}}{AFTER}" == CASE["template"]
    assert CASE["dropped_tokens"] == DROPPED
    for one, states, mask in zip(found, TENSORS["vlm_states"], TENSORS["vlm_mask"], strict=True):
        (ours,), (real,), count = one["vlm_embed"], one["vlm_mask"], int(mask.sum())
        assert len(ours) == count
        assert real.dtype == torch.int64
        assert bool(real.all())
        torch.testing.assert_close(ours, states[:count], rtol=0, atol=2e-5)


def test_what_is_to_be_written_equals_the_recorded_texts() -> None:
    assert [glyph_text(prompt) for prompt in CASE["prompts"]] == CASE["glyph_texts"]
    assert [bool(find_quoted(prompt)) for prompt in CASE["prompts"]] == CASE["ocr_mask"]


def test_states_of_glyphs_equal_the_recorded_ones(tmp_path: Path) -> None:
    model = CASE["models"]["byt5"]
    weights = make_weights(model["weights_model_key"], model["weights"], CASE["salt"])
    encoder = GlyphTextEncoder(save(tmp_path / "byt5.safetensors", weights), torch.float32)

    found = encode(encoder, *CASE["prompts"])

    for index, one in enumerate(found):
        assert torch.equal(one["byt5_mask"], TENSORS["byt5_mask"][index])
        assert one["ocr_mask"].tolist() is CASE["ocr_mask"][index]
        torch.testing.assert_close(one["byt5_embed"], TENSORS["byt5_states"][index], rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", ["comfy", "transformers", "bare"])
def test_every_layout_of_the_language_model_gives_the_same_states(layout: str, tmp_path: Path) -> None:
    folder = write_qwen(tmp_path / "whole")
    path = save(tmp_path / "one" / "qwen.safetensors", qwen_layouts(qwen_state())[layout])
    path.with_name("config.json").write_text(json.dumps(qwen_config()), encoding="utf-8")

    (ours,) = encode(QwenTextEncoder(path, torch.float32, folder / "tokenizer.json"), "a cat")

    (expected,) = encode(QwenTextEncoder(folder, torch.float32), "a cat")
    assert torch.equal(ours["vlm_embed"][0], expected["vlm_embed"][0])


def test_states_equal_those_of_transformers_class_for_pictures_and_texts(tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    folder = write_qwen(tmp_path)
    encoder = QwenTextEncoder(folder, torch.float32)
    (ours,) = encode(encoder, "two dogs")
    state = {name.removeprefix("model."): tensor for name, tensor in qwen_state().items()}
    sizes: dict[str, Any] = {
        "vocab_size": 524,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    }
    told = {name: qwen_config()[name] for name in ("hidden_size", "num_attention_heads", "rms_norm_eps")}
    model = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**told, **sizes)).eval()
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("lm_head")})
    tokenizer = encoder._loaded.get()[1]
    ids = torch.tensor([tokenizer.read(f"{BEFORE}two dogs{AFTER}").ids])

    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[-3]

    torch.testing.assert_close(ours["vlm_embed"][0], states[0, DROPPED:], rtol=0, atol=1e-5)


def test_glyphs_are_cut_at_128_bytes_and_keep_their_end(tmp_path: Path) -> None:
    encoder = GlyphTextEncoder(save(tmp_path / "byt5.safetensors", byt5_state()), torch.float32)

    (long,) = encode(encoder, f'"{"x" * 200}"')
    counted = encoder.token_counter()(f'"{"x" * 200}"')

    assert int(long["byt5_mask"].sum()) == 128
    assert counted.is_cut
    assert counted.tokens > 128
    assert encoder.token_counter()("nothing to write").tokens == 0


def test_caches_depend_on_files_and_dtype_and_not_on_the_device(tmp_path: Path) -> None:
    folder = write_qwen(tmp_path)
    plain = QwenTextEncoder(folder, torch.float32).identity

    assert QwenTextEncoder(folder, torch.float32, on_cpu=True).identity == plain
    assert QwenTextEncoder(folder, torch.bfloat16).identity != plain
    assert QwenTextEncoder(folder, torch.float32, in_fp8=True).identity != plain


def test_another_language_model_is_refused_by_name(tmp_path: Path) -> None:
    llama = save(tmp_path / "llama.safetensors", prefixed(llama_tensors(config=llama_config()), "model."))

    with pytest.raises(CheckpointError, match="Qwen2.5-VL"):
        _ = QwenTextEncoder(llama).identity
