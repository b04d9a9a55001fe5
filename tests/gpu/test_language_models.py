"""Language models whose layers come from host memory one by one: the same numbers in less memory."""

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from encoders import language_encoder
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelEncoder
from tests.encoders.test_language_models import KLEIN, QWEN_IMAGE, Z_IMAGE
from tests.encoders.test_picture_prompts import USE, pictured, pictures
from tests.tiny.language_models import qwen3, qwen25_vl, write_model, write_qwen_tokenizer

TEXTS = ("a rabbit in the grass", "", "the sun rises over the hills")


def encoded(encoder: LanguageModelEncoder, key: str, shown: list[list[Tensor]]) -> list[Tensor]:
    with torch.inference_mode():
        found = encoder.encode(
            [pictured(encoder.path.parent, *one) for one in zip(TEXTS, shown, strict=True)]
        )
    return [value[0] if isinstance(value := one[key], list) else value for one in found]


@pytest.mark.parametrize("form", [None, "fp8"], ids=["whole", "fp8"])
@pytest.mark.parametrize("use", [Z_IMAGE, KLEIN, USE], ids=["one state", "joined", "pictures"])
def test_streamed_layers_give_the_same_states(
    use: LanguageEncoderSettings,
    form: str | None,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = qwen25_vl() if use.model is QWEN_IMAGE.model else qwen3()
    path = write_model(write_qwen_tokenizer(tmp_path) / "model.safetensors", model)
    shown = [pictures((60, 90)), [], pictures((90, 60), (30, 30))] if use.image_format else [[]] * 3
    results = []
    for streamed in (False, True):
        monkeypatch.setattr(language_encoder, "spare_bytes", lambda _, room=0 if streamed else 1 << 40: room)
        encoder = LanguageModelEncoder(use, path, torch.float32, form=form)
        encoder.load(device)
        results.append(encoded(encoder, use.states_key, shown))
        encoder.load(device)
        assert all(map(torch.equal, encoded(encoder, use.states_key, shown), results[-1]))
        if streamed and device.type == "cuda":
            weights = dict(encoder.network.named_parameters())
            assert weights["embed_tokens.weight"].is_cuda
            assert not all(weights[f"layers.{index}.mlp.up_proj.weight"].is_cuda for index in range(3))
        encoder.free()
        gc.collect()
    assert all(map(torch.equal, *results))
