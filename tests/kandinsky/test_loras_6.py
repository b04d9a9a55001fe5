"""LoRAs of Kandinsky 6 under the names of each program change the same weights, in diffusers too."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kandinsky.names import KANDINSKY_6
from networks.lora_format import LoraFormat
from networks.names.layouts import KNOWN
from tests.kandinsky.making_6 import in_diffusers, predict_with, tiny_inputs, tiny_model
from tests.kandinsky.test_loras import ALPHA, RANK, convert, merge, rename
from tests.tiny.hunyuan_encoders import save
from tests.tiny.kandinsky_6 import tiny_state
from tests.tiny.loras import make_lora

State = dict[str, Tensor]
MODULES = 2 * 28 + 2 * 2 * 6  # of two blocks, and of two blocks for the text of each stream
# name -> --target of the file that it is made from, and the change
DIALECTS: dict[str, tuple[str, Callable[[State], State]]] = {
    "ComfyUI": ("other", dict),
    "diffusers": ("diffusers", dict),
    "underscores": ("default", dict),
    "the maker's trainer": (
        "other",
        rename(
            ("diffusion_model.", "base_model.model."),
            ("lora_A.", "lora_A.default."),
            ("lora_B.", "lora_B.default."),
        ),
    ),
}


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A LoRA with the names that other LoRA trainers have."""
    network = make_lora("lora_kandinsky", RANK, ALPHA, tiny_model())
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path / "ours.safetensors"
    LoraFormat(KNOWN, KANDINSKY_6).save(network, path, None, {"ss_base_model_version": KANDINSKY_6.name})
    return path


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_changes_the_same_weights(known: Path, tmp_path: Path, name: str) -> None:
    """And a file without metadata is told by its names alone."""
    before = tiny_state()
    dit = save(tmp_path / "dit.safetensors", before)
    expected = merge(dit, known)
    assert sum(not torch.equal(before[key], weight) for key, weight in expected.items()) == MODULES
    target, change = DIALECTS[name]
    path = tmp_path / "changed.safetensors"
    save_file(change(load_file(convert(known, target))), path)

    merged = merge(dit, path)

    for key, weight in expected.items():
        torch.testing.assert_close(merged[key], weight, rtol=0, atol=1e-6, msg=key)


@torch.no_grad()
def test_diffusers_loads_what_is_converted_for_it(known: Path, tmp_path: Path) -> None:
    dit = in_diffusers(tiny_state())
    merged = merge(save(tmp_path / "dit.safetensors", tiny_state()), known)
    inputs = tiny_inputs(image=True)
    without = predict_with(dit, inputs)

    dit.load_lora_adapter(load_file(convert(known, "diffusers")), prefix="transformer")

    loaded, expected = predict_with(dit, inputs), predict_with(in_diffusers(merged), inputs)
    assert (loaded.video - without.video).abs().max() > 1e-2
    torch.testing.assert_close(loaded.video, expected.video, rtol=0, atol=1e-4)
    torch.testing.assert_close(loaded.audio, expected.audio, rtol=0, atol=1e-4)
