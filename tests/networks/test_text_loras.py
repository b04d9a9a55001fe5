"""Parts of LoRAs for text encoders: what is reported is what is done."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modules.errors import CheckpointError
from networks.apply import LoraPatch
from networks.gated_loras import find_parameters, fit_lora
from networks.loading import WeightedLora, read_lora
from networks.text_loras import FullPatch, rename_for_encoders, select_for_network

SDXL = ("lora_te1", "lora_te2")
UNET = "lora_unet_mid_block_resnets_0_conv1"  # of Stable Diffusion 1, 2 and XL, with the same sizes
LAYER = "encoder_layers_0_mlp_fc1"
SIZE = 4


def write(path: Path, *modules: str) -> WeightedLora:
    """A LoRA of rank 1 on modules, and on a convolution that does not say which model it is for."""
    tensors: dict[str, Tensor] = {
        f"{UNET}.lora_down.weight": torch.ones(1, 1280, 3, 3),
        f"{UNET}.lora_up.weight": torch.ones(1280, 1, 1, 1),
    }
    generator = torch.Generator().manual_seed(1)
    for module in modules:
        down, up = (
            (".lora_A.weight", ".lora_B.weight")
            if "." in module
            else (".lora_down.weight", ".lora_up.weight")
        )
        tensors[module + down] = torch.randn(1, SIZE, generator=generator)
        tensors[module + up] = torch.randn(SIZE, 1, generator=generator)
    save_file(tensors, path)
    return WeightedLora(read_lora(path, with_texts=True))


def acting(uses: list[WeightedLora], prefix: str, prefixes: tuple[str, ...] | None = None) -> set[str]:
    parts = select_for_network(uses, prefix, prefixes)
    return {name.partition(".")[0] for use in parts for name in use.lora.tensors}


@pytest.mark.parametrize(
    "module", [f"lora_te1_{LAYER}", f"lora_te1_text_model_{LAYER}", "text_encoder.encoder.layers.0.mlp.fc1"]
)
def test_the_first_encoder_of_a_file_for_several_models_acts_and_is_not_said_to_be_ignored(
    tmp_path: Path, module: str, caplog: pytest.LogCaptureFixture
) -> None:
    use = write(tmp_path / "lora.safetensors", module)

    for prefixes in (SDXL, ("lora_te",)):  # of Stable Diffusion XL, and of 1 and 2
        uses = rename_for_encoders([use], "this model", prefixes)
        assert acting(uses, prefixes[0]) == {f"lora_unet_text_model_{LAYER}"}
        assert acting([use], prefixes[0], prefixes) == acting(uses, prefixes[0])
    assert "ignored" not in caplog.text


def test_a_part_that_is_said_to_be_ignored_does_not_act(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`lora_te` is the only encoder of other models."""
    use = write(tmp_path / "lora.safetensors", f"lora_te_text_model_{LAYER}")

    uses = rename_for_encoders([use], "this model", SDXL)
    assert (
        "2 tensors change a text encoder, which this model does not contain, and are ignored" in caplog.text
    )
    assert not acting(uses, "lora_te1")
    assert not acting([use], "lora_te1", SDXL)


@pytest.mark.parametrize("name", ["text_projection", "text_projection.weight"])
def test_the_projection_is_added_in_either_form_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    """OpenCLIP's parameter is the transposed weight of a linear layer."""
    use = write(tmp_path / "lora.safetensors", "lora_te2_text_projection")
    key = f"conditioner.embedders.1.model.{name}"
    names = [key, "conditioner.embedders.0.transformer.text_model.x", "model.diffusion_model.x"]
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    texts = use.lora.text_tensors
    change = (
        texts["lora_te2_text_projection.lora_up.weight"] @ texts["lora_te2_text_projection.lora_down.weight"]
    )

    merged = FullPatch([use], names, tmp_path / "model.safetensors").add_to(key, weight.clone())

    expected = weight + (change if name.endswith("weight") else change.T)
    torch.testing.assert_close(merged, expected)


def test_what_an_encoder_lacks_is_called_by_its_own_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deep = "lora_te1_text_model_encoder_layers_40_mlp_fc1"
    modules = [f"lora_te1_text_model_{LAYER}", "lora_te1_text_projection", deep, "lora_te1_text_model_head"]
    use = write(tmp_path / "lora.safetensors", *modules)
    patch = LoraPatch(select_for_network([use], "lora_te1", SDXL))
    patch.add_to("text_model.encoder.layers.0.mlp.fc1.weight", torch.zeros(SIZE, SIZE))

    with caplog.at_level(logging.WARNING):
        patch.check()

    projection = "they are the projection of the first text encoder, which this model does not use: "
    assert f"{projection}lora_te1_text_projection.weight" in caplog.text
    assert "the first text encoder of this model has no such layers" in caplog.text
    assert deep in caplog.text
    assert "lora_unet" not in caplog.text


class Encoder(nn.Module):
    """Of a model that uses no projection."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = nn.Linear(SIZE, SIZE)


@pytest.mark.parametrize("way", ["merged", "added"])
def test_a_projection_alone_that_an_encoder_lacks_is_a_warning(
    tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The file's other parts act; a file of this part alone does nothing, and is refused."""

    def put_in(use: WeightedLora) -> None:
        (part,) = select_for_network([use], "lora_te1", SDXL)
        if way == "added":
            assert not fit_lora(part.lora, find_parameters(Encoder()), "--network_weights")
            return
        patch = LoraPatch([part])
        patch.add_to("text_model.weight", torch.zeros(SIZE, SIZE))
        patch.check()

    use = write(tmp_path / "lora.safetensors", "lora_te1_text_projection")
    put_in(use)
    assert "they are the projection of the first text encoder, which this model does not use" in caplog.text

    save_file(dict(use.lora.text_tensors), tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match="lora_te1_text_projection"):
        put_in(WeightedLora(read_lora(tmp_path / "alone.safetensors", with_texts=True)))
