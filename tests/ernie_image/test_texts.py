"""States of texts are those of transformers' Ministral 3, behind a begin token and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.opening import open_checkpoint
from encoders.language_encoder import LanguageModelEncoder
from encoders.language_models import MINISTRAL3, load_language_model, read_language_model
from ernie_image.files import ENCODER_SETTINGS, TEXT_STATES_KEY
from flux_2.versions import MISTRAL3
from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text
from protocols.requests import Prompt
from tests.ernie_image.making import text_encoder_there
from tests.manifests import tensor_list, write_hollow
from tests.tiny.ernie_image import write_text_encoder
from tests.tiny.language_models import (
    layouts,
    ministral3,
    mistral3,
    mistral_tokenizer,
    qwen3,
    write_model,
)

CPU = torch.device("cpu")
TEXT = "a small rabbit runs through the grass"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("texts") / "text_encoder")


def load(path: Path, **changes: Any) -> LanguageModelEncoder:
    encoder = LanguageModelEncoder(replace(ENCODER_SETTINGS, **changes), path, torch.float32)
    encoder.load(CPU)
    return encoder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> LanguageModelEncoder:
    return load(folder)


def states_of(encoder: LanguageModelEncoder, text: str) -> Tensor:
    (conditions,) = encoder.encode([Prompt(text)])
    return conditions[TEXT_STATES_KEY][0]  # type: ignore[return-value]


@torch.no_grad()
def states_there(text: str, state: int = -2) -> Tensor:
    ids = mistral_tokenizer().encode(text, add_special_tokens=False).ids
    states: Tensor = text_encoder_there()(torch.tensor([ids]), output_hidden_states=True).hidden_states[
        state
    ][0]
    return states


@pytest.mark.parametrize("text", [TEXT, "", " a cat,\n  red "])
def test_states_are_those_before_the_last_layer_of_the_caption_as_it_is(
    encoder: LanguageModelEncoder, text: str
) -> None:
    """White space stays; an empty caption is the begin token alone."""
    states = states_of(encoder, text)

    torch.testing.assert_close(states, states_there(f"<s>{text}"), rtol=1e-5, atol=1e-5)
    if not text:
        assert len(states) == 1


def distance(states: Tensor, other: Tensor) -> float:
    if states.shape != other.shape:
        return float("inf")
    return float((states - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(
    "change",
    [
        {"states": (-1,)},
        {"states": (-1,), "pre_norm": True},
        {"states": (2,)},
        {"template_prefix": ""},
        {"template_prefix": "<s>[INST]", "template_suffix": "[/INST]"},
        {"num_dropped_tokens": 1},
        {"strips_prompt": True},
    ],
    ids=str,
)
def test_other_states_and_texts_are_told_from_those(
    folder: Path, encoder: LanguageModelEncoder, change: dict[str, Any]
) -> None:
    """The last state, a template, no begin token: each would be seen."""
    assert distance(states_of(load(folder, **change), f" {TEXT} "), states_of(encoder, f" {TEXT} ")) > 0.01


def test_frequencies_are_slowed_as_trained(folder: Path, encoder: LanguageModelEncoder) -> None:
    """Without YaRN the states of the tiny encoder, whose original length is short, are others."""
    plain = replace(
        MINISTRAL3, read_settings=lambda *_: {"rope_scaling": {"rope_type": "default"}}, rope_types=("yarn",)
    )
    assert distance(states_of(load(folder, model=plain), TEXT), states_of(encoder, TEXT)) > 1e-3


def test_a_file_without_its_configuration_has_the_released_frequencies(tmp_path: Path) -> None:
    """As ComfyUI's has none: theta, factor and original length are the release's."""
    folder = write_text_encoder(tmp_path)
    (folder / "config.json").unlink()
    narrow = replace(MINISTRAL3, head_width=32)  # of the tiny encoder
    with open_checkpoint(folder) as checkpoint:
        config = read_language_model(checkpoint, narrow, (-2,)).config
    rope = config.settings["rope_scaling"]
    assert (config.theta, config.eps, rope["factor"]) == (1e6, 1e-5, 16.0)
    assert (rope["original_max_position_embeddings"], rope["beta_fast"], rope["beta_slow"]) == (16384, 32, 1)


@pytest.mark.parametrize("kind", ["ministral3", "mistral"])
def test_copies_of_the_configuration_may_call_it_mistral(tmp_path: Path, kind: str) -> None:
    folder = write_text_encoder(tmp_path)
    file = folder / "config.json"
    file.write_text(read_text(file).replace('"mistral"', f'"{kind}"'), encoding="utf-8")
    assert parse_json(read_text(file))["model_type"] == kind
    with open_checkpoint(folder) as checkpoint:
        rope = read_language_model(checkpoint, MINISTRAL3, (-2,)).config.settings["rope_scaling"]
    assert rope["original_max_position_embeddings"] == 64


@pytest.mark.parametrize(
    ("old", "new"), [('"factor": 16.0', '"factor": -1'), ('"rope_type": "yarn"', '"rope_type": "linear"')]
)
def test_wrong_frequencies_are_refused(tmp_path: Path, old: str, new: str) -> None:
    folder = write_text_encoder(tmp_path)
    file = folder / "config.json"
    text = read_text(file)
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=r"config\.json"):
        read_language_model(checkpoint, MINISTRAL3, (-2,))


def test_the_released_file_fits_at_full_size(tmp_path: Path) -> None:
    """Loading raises for every tensor that is left over; the last layer is not loaded."""
    path = write_hollow(tmp_path / "model.safetensors", tensor_list("ministral-3-3b"))

    network: Any = load_language_model(
        path, MINISTRAL3, torch.device("meta"), torch.bfloat16, ENCODER_SETTINGS.states
    )

    config = network.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (25, 3072, 128)
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 8)
    frequencies = network.rotary_emb._angles[0].inv_freq
    plain = 1e6 ** -(torch.arange(0, 128, 2) / 128)
    ratio = frequencies / plain
    torch.testing.assert_close(ratio[:21], torch.ones(21))
    torch.testing.assert_close(ratio[37:], torch.full((27,), 1 / 16))
    assert network.rotary_emb._angles[0].attention_scaling == 1.0


@pytest.mark.parametrize("layout", sorted(layouts(ministral3())))
def test_every_layout_of_files_is_read(tmp_path: Path, encoder: LanguageModelEncoder, layout: str) -> None:
    folder = write_text_encoder(tmp_path)
    write_model(folder / "model.safetensors", ministral3(), layout)
    assert torch.equal(states_of(load(folder), TEXT), states_of(encoder, TEXT))


def test_a_language_model_of_another_family_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.safetensors", qwen3())
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="Qwen3") as caught:
        read_language_model(checkpoint, MINISTRAL3)
    assert "ministral-3-3b.safetensors" in str(caught.value)


def test_flux_2_s_encoder_still_refuses_slowed_frequencies(tmp_path: Path) -> None:
    """Mistral Small 3 was trained without them."""
    write_model(tmp_path / "model.safetensors", mistral3())
    file = tmp_path / "config.json"
    file.write_text(read_text(file).replace('"default"', '"yarn"'), encoding="utf-8")
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="yarn"):
        read_language_model(checkpoint, MISTRAL3)
