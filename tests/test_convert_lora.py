"""convert_lora.py through its command line."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
from modules.errors import CheckpointError
from networks.metadata import model_hashes, save_network
from tests.frame_pack.making import tiny_model
from tests.networks.making import randomize, tiny_dit, wan_network
from tests.tiny.loras import make_lora


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return load_file(path), dict(file.metadata() or {})


def convert(source: Path, output: Path, target: str) -> None:
    convert_lora.main(["--input", str(source), "--output", str(output), "--target", target])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    save_network(
        wan_network(tiny_dit(tmp_path)),
        path,
        torch.bfloat16,
        {"ss_output_name": "lora", "modelspec.title": "A title"},
    )
    return path


def test_metadata_are_copied_and_hashes_made_anew(tmp_path: Path, saved: Path) -> None:
    convert(saved, tmp_path / "other.safetensors", "other")
    convert(tmp_path / "other.safetensors", tmp_path / "back.safetensors", "default")

    _, before = read(saved)
    for name in ("other", "back"):
        tensors, metadata = read(tmp_path / f"{name}.safetensors")
        assert metadata["ss_output_name"] == "lora"
        assert metadata["modelspec.title"] == "A title"
        hashes = model_hashes(tensors, metadata)
        assert {key: metadata[key] for key in hashes} == hashes
        assert metadata["sshs_model_hash"] != before["sshs_model_hash"]


def test_there_and_back_and_there_again_is_the_same_file_content(tmp_path: Path, saved: Path) -> None:
    for source, target in (
        (saved, "other"),
        ("other1", "default"),
        ("default2", "other"),
        ("other3", "default"),
    ):
        number = {"lora": 1, "other1": 2, "default2": 3, "other3": 4}[Path(source).stem]
        convert(
            tmp_path / Path(source).with_suffix(".safetensors").name,
            tmp_path / f"{target}{number}.safetensors",
            target,
        )

    for first, second in (("other1", "other3"), ("default2", "default4")):
        one, two = read(tmp_path / f"{first}.safetensors"), read(tmp_path / f"{second}.safetensors")
        assert one[1] == two[1]
        assert one[0].keys() == two[0].keys()
        assert all(torch.equal(tensor, two[0][name]) for name, tensor in one[0].items())


def test_a_lokr_cannot_become_diffusers_but_by_baking(tmp_path: Path) -> None:
    save_file(
        {
            "lora_unet_blocks_0_ffn_0.lokr_w1": torch.ones(2, 2),
            "lora_unet_blocks_0_ffn_0.lokr_w2": torch.ones(2, 2),
        },
        tmp_path / "x.safetensors",
    )

    with pytest.raises(CheckpointError, match=r"has no form in this dialect\).\n  --bake"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "diffusers")
    assert not (tmp_path / "y.safetensors").exists()


def test_a_framepack_lora_has_the_models_own_names_and_comes_back_the_same(tmp_path: Path) -> None:
    network = make_lora("lora_framepack", 4, 3.0, tiny_model())
    randomize(network)
    save_network(
        network, tmp_path / "lora.safetensors", torch.float32, {"ss_base_model_version": "framepack"}
    )
    modules = {path for path, module in tiny_model().named_modules() if isinstance(module, torch.nn.Linear)}

    for source, output, target in (
        ("lora", "other", "other"),
        ("other", "back", "default"),
        ("back", "again", "other"),
    ):
        convert(tmp_path / f"{source}.safetensors", tmp_path / f"{output}.safetensors", target)

    other, back, again = (read(tmp_path / f"{name}.safetensors")[0] for name in ("other", "back", "again"))
    paths = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in other}
    assert paths <= modules
    assert len(paths) == len(network.layers) == len(other) / 2
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in again.items())
    for name, layer in network.named_children():
        product = back[f"{name}.lora_up.weight"] @ back[f"{name}.lora_down.weight"]
        torch.testing.assert_close(
            product, 3 / 4 * layer.lora_up.weight @ layer.lora_down.weight, rtol=1e-5, atol=1e-6
        )
