"""Lumina's text encoder against recorded ids and states, its tokenizers, and what it tells apart."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lumina.text_encoder import GemmaTextEncoder
from modules.contract.family import can_learn
from modules.contract.requests import Prompt
from modules.run_blocks import spec_of
from tests.golden_cases import make_weights, read_case
from tests.tiny.lumina import write_gemma
from tests.tiny.pieces import train_pieces

CPU = torch.device("cpu")
SYSTEM = "You are an assistant designed to generate high-quality images based on user prompts."


def tiny_encoder(tmp_path: Path, **settings: object) -> GemmaTextEncoder:
    encoder = GemmaTextEncoder(write_gemma(tmp_path / "gemma"), torch.float32, **settings)  # type: ignore[arg-type]
    encoder.load(CPU)
    return encoder


def test_texts_ids_and_states_equal_those_recorded(tmp_path: Path) -> None:
    description, tensors = read_case("lumina_text")
    recorded = description["models"]["gemma2"]
    folder = write_gemma(tmp_path)
    save_file(make_weights(recorded["weights_model_key"], recorded["weights"]), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2", **recorded["config"]}), "utf-8")

    for with_system in (SYSTEM, ""):
        encoder = GemmaTextEncoder(folder, torch.float32, None, with_system, max_tokens=description["length"])
        encoder.load(CPU)
        cases = [n for n, case in enumerate(description["texts"]) if case["system_prompt"] == with_system]
        texts = [description["texts"][number] for number in cases]
        prompts = [Prompt(case["prompt"], is_negative=case["is_negative"]) for case in texts]
        with torch.no_grad():
            encoded = encoder.encode(prompts)

        assert [encoder.write(prompt).text for prompt in prompts] == [case["text"] for case in texts]
        for number, found in zip(cases, encoded, strict=True):
            assert torch.equal(found["input_ids"], tensors["ids"][number])  # type: ignore[arg-type]
            assert torch.equal(found["attention_mask"], tensors["mask"][number])  # type: ignore[arg-type]
            torch.testing.assert_close(found["hidden_state"], tensors["states"][number], atol=3e-4, rtol=0)


def test_a_negative_prompt_has_the_system_prompt_only_if_asked_for(tmp_path: Path) -> None:
    folder = write_gemma(tmp_path)
    for in_negative, expected in ((False, "dull"), (True, "Draw. <Prompt Start> dull")):
        encoder = GemmaTextEncoder(folder, system_prompt="Draw.", in_negative=in_negative)
        assert encoder.write(Prompt("dull", is_negative=True)).text == expected
        assert encoder.write(Prompt("dull")).text == "Draw. <Prompt Start> dull"
    assert Prompt("dull") != Prompt("dull", is_negative=True)  # what the cache of a session looks up


def test_gradients_flow_and_a_lora_finds_the_layers(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, max_tokens=16)
    assert can_learn(encoder)
    assert encoder.lora_prefix == "lora_te"
    weight = encoder.network.get_parameter("layers.0.mlp.up_proj.weight").requires_grad_()

    encoder.encode([Prompt("a cat")])[0]["hidden_state"].sum().backward()  # type: ignore[union-attr]

    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
    assert [len(blocks) for blocks in spec_of(encoder.network).blocks(encoder.network).values()] == [2]


def test_the_tokenizer_inside_a_file_is_that_beside_it(tmp_path: Path) -> None:
    """SentencePiece bytes as ComfyUI puts them into the file."""
    model = train_pieces(tokens=60)
    folder = write_gemma(tmp_path / "gemma")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model)
    beside = GemmaTextEncoder(folder, torch.float32, max_tokens=16)
    alone = tmp_path / "alone"
    alone.mkdir()
    weights = load_file(folder / "model.safetensors")
    blob = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    save_file(weights | {"spiece_model": blob}, alone / "gemma.safetensors")
    (alone / "config.json").write_bytes((folder / "config.json").read_bytes())
    inside = GemmaTextEncoder(alone / "gemma.safetensors", torch.float32, max_tokens=16)
    found = []
    for encoder in (beside, inside):
        encoder.load(CPU)
        with torch.no_grad():
            found.append(encoder.encode([Prompt("a red cat")])[0])

    assert found[0]["input_ids"][0] == 2  # type: ignore[index]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])  # type: ignore[arg-type]
    assert inside.identity["gemma2_tokenizer"] == "inside the checkpoint"
