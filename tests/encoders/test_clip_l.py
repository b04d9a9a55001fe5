"""CLIP-L as FLUX uses it; tests/hunyuan_model has its files, its tokenizers and HunyuanVideo's use."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from encoders.clip_l import ClipTextEncoder
from hunyuan_model.text_encoders import LlavaTextEncoder
from modules.contract.family import can_learn
from modules.contract.requests import Prompt
from modules.errors import CheckpointError
from tests.golden_cases import make_weights, read_case
from tests.tiny.hunyuan_encoders import save
from tests.tiny.picture_encoders import write_clip_l

CPU = torch.device("cpu")


def test_ids_and_pooled_states_equal_those_recorded(tmp_path: Path) -> None:
    case, tensors = read_case("flux_text")
    save(tmp_path / "clip_l.safetensors", make_weights("clip-l", case["models"]["clip_l"]["weights"]))
    (tmp_path / "tokenizer.json").write_text(json.dumps(case["tokenizers"]["clip_l"]), encoding="utf-8")
    encoder = ClipTextEncoder(tmp_path / "clip_l.safetensors", torch.float32)
    encoder.load(CPU)

    found = encoder.encode([Prompt(text) for text in case["prompts"]])

    tokenizer = encoder._loaded.get()[1]
    for index, text in enumerate(case["prompts"]):
        row = tokenizer.read(text).cut(77).ids
        assert [*row, *row[-1:] * (77 - len(row))] == tensors["clip_ids"][index].tolist()
        assert found[index].keys() == encoder.keys == {"l_pooled"}
        torch.testing.assert_close(found[index]["l_pooled"], tensors["clip_pooled"][index], atol=2e-4, rtol=0)


def test_gradients_reach_what_learns_in_the_first_layer(tmp_path: Path) -> None:
    encoder = ClipTextEncoder(write_clip_l(tmp_path), torch.float32)
    assert can_learn(encoder)
    assert not can_learn(LlavaTextEncoder(tmp_path))
    encoder.load(CPU)
    network = encoder.network
    (layers,) = network.spec.blocks(network).values()
    linear = [part for part in nn.ModuleList(layers).modules() if isinstance(part, nn.Linear)]
    assert len(linear) == 6 * len(layers)  # 72 in CLIP-L
    extra = torch.zeros(linear[0].out_features, requires_grad=True)
    linear[0].register_forward_hook(lambda _module, _given, out: out + extra)
    encoder.encode([Prompt("a rabbit")])[0]["l_pooled"].square().sum().backward()  # type: ignore[union-attr]
    assert extra.grad is not None
    assert extra.grad.abs().max() > 0


def test_messages_name_fluxs_option(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", {"a.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"is not a CLIP text encoder(.|\n)*to --clip_l"):
        dict(ClipTextEncoder(path).identity)
