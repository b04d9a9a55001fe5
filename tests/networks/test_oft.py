"""OFT: rotations equal to PEFT's, trained, merged, added, converted; what cannot be is refused."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from peft import OFTConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convert_lora
from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError, OptionError
from networks.apply import LoraPatch
from networks.convert import convert_file
from networks.delta import read_delta
from networks.gated_loras import ChangedParameter, LoraBranch, LoraWrapper, add_loras
from networks.kinds.oft_rotation import compute_rotations, find_block_size, rotate_weight
from networks.loading import WeightedLora, read_lora
from networks.metadata import describe_lora
from networks.train.oft import OftLayer, fit_block_size
from protocols.loading import Placement
from tests.networks.making import inputs, tiny_dit
from tests.tiny.loras import lora_like, unused
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.training.conftest import _fresh_accelerator  # noqa: F401
from tests.training.toy import ToyFamily, same, toy_options, train_toy, train_with_kills, write_caches
from training.run import train_network
from wan.checkpoints import load_dit

CPU = torch.device("cpu")
OFT = ["--network_module", "networks.oft", "--network_dim", 4]


def angles(blocks: int, size: int, seed: int = 0, scale: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(blocks, size * (size - 1) // 2, generator=generator)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_output_gradients_and_merged_weight_are_those_of_peft(strength: float) -> None:
    torch.manual_seed(0)
    ours, values = Model().requires_grad_(False), angles(3, 8)
    theirs = get_peft_model(copy.deepcopy(ours), OFTConfig(oft_block_size=8, target_modules=["layer"]))
    rotation = dict(theirs.named_parameters())["base_model.model.layer.oft_R.default.weight"]
    rotation.data.copy_(strength * values)
    layer = OftLayer(ours.layer, 8)
    layer.multiplier = strength
    layer.attach()
    layer.oft_R.weight.data.copy_(values)
    x, other = (torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x.requires_grad_()
    other.requires_grad_()

    found, expected = ours(x), theirs(other)

    torch.testing.assert_close(found, expected)
    mine = torch.autograd.grad(found.square().sum(), [x, layer.oft_R.weight])
    others = torch.autograd.grad(expected.square().sum(), [other, rotation])
    torch.testing.assert_close(mine[0], others[0])
    torch.testing.assert_close(mine[1], strength * others[1], rtol=1e-4, atol=1e-4)
    merged = ours.layer.weight + rotate_weight(ours.layer.weight, compute_rotations(values, strength))
    torch.testing.assert_close(merged, theirs.merge_and_unload().layer.weight)


def test_a_layer_without_strength_is_the_frozen_one() -> None:
    original = nn.Linear(8, 4)
    layer, x = OftLayer(original, 4), torch.randn(3, 8)
    plain = original(x)
    layer.attach()
    assert torch.equal(original(x), plain)  # it begins without a rotation
    layer.oft_R.weight.data.normal_()
    assert not torch.allclose(original(x), plain)
    layer.multiplier = 0.0
    assert torch.equal(original(x), plain)


@pytest.mark.parametrize(
    ("width", "size", "wanted"),
    [(24, 8, 8), (24, 7, 6), (24, 5, 4), (30, 32, 30), (5, 32, 5), (7, 2, 7), (1, 32, None), (1536, 32, 32)],
)
def test_a_block_size_becomes_the_nearest_divisor(width: int, size: int, wanted: int | None) -> None:
    assert fit_block_size(width, size) == wanted


def test_block_sizes_are_known_by_their_number_of_values() -> None:
    assert [find_block_size(columns) for columns in (0, 1, 2, 3, 6, 28, 496)] == [None, 2, None, 3, 4, 8, 32]


def test_what_is_trained_is_what_is_merged_and_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    with caplog.at_level(logging.INFO):
        tensors = train_toy(tmp_path, *OFT)
    path = tmp_path / "output" / "x.safetensors"
    assert all(name.endswith(".oft_R.weight") and tensor.any() for name, tensor in tensors.items())
    assert "OFT on" in caplog.text
    assert "block size" in caplog.text
    patch = LoraPatch([WeightedLora(read_lora(path))])
    merged = ToyFamily().load_dit(Placement(CPU, patch=patch))
    assert unused(patch) == []
    dit = ToyFamily().load_dit(Placement(CPU))
    network = lora_like("oft", read_lora(path).tensors, dit)
    network.attach()
    assert network.load_weights(path) == []
    x = torch.randn(1, 2, 1, 4, 4), torch.tensor([500.0]), [torch.ones(1, 1)]

    with torch.no_grad():
        found, unchanged = dit(*x), ToyFamily().load_dit(Placement(CPU))(*x)
        torch.testing.assert_close(found, merged(*x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, unchanged)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    with open_checkpoint(path) as checkpoint:
        assert "an OFT, names as in sd-scripts, block size" in (describe_lora(checkpoint) or "")
    assert "PEFT reads an OFT without changes" in caplog.text
    assert "Make a plain LoRA of the OFT" in caplog.text
    assert metadata["ss_network_module"] == "networks.oft"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "None")


DROPPING = ["--network_dropout", 0.3, "--network_args", "module_dropout=0.2"]


@pytest.mark.slow
def test_a_killed_run_ends_with_equal_bytes_and_a_file_begins_another(tmp_path: Path) -> None:
    write_caches(tmp_path)
    precision = ["--mixed_precision", "bf16"]  # one for all runs of a process, as accelerate keeps it
    words = [*OFT, *DROPPING, "--ema_decay", 0.9, *precision]
    words += ["--save_every_n_steps", 2, "--save_state", "--resume", "latest"]
    expected = train_toy(tmp_path, *words)
    metadata = _metadata(tmp_path / "output" / "x.safetensors")
    assert same(train_with_kills(tmp_path, *words, moments=(3, 2)), expected)
    resumed = _metadata(tmp_path / "killed" / "x.safetensors")
    assert resumed["ss_network_dim"] == metadata["ss_network_dim"]

    path = tmp_path / "output" / "x.safetensors"
    still = ["--learning_rate", 0, "--max_train_steps", 1, "--network_weights", path, "--output_name", "y"]
    still += precision
    assert same(train_toy(tmp_path, *OFT, *still), expected)
    assert same(train_toy(tmp_path, *OFT[:2], *still, "--dim_from_weights"), expected)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("how", [["--gradient_checkpointing"], ["--blocks_to_swap", 1]])
def test_dropout_and_savers_of_memory_give_the_same_bits(tmp_path: Path, how: list[object]) -> None:
    write_caches(tmp_path)
    words = [*OFT, *DROPPING]
    expected = train_toy(tmp_path, *words)

    assert same(train_toy(tmp_path, *words, *how, "--output_name", "y"), expected)
    assert not same(train_toy(tmp_path, *OFT, "--output_name", "z"), expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--network_args", "rank_dropout=0.1"], "an OFT has no ranks"),
        (["--network_args", "dora_wd=True"], "are for LoRAs only"),
        (["--network_args", "loraplus_lr_ratio=4"], "are for LoRAs only"),
        (["--network_args", "conv_dim=4"], "are for LoRAs only"),
        (["--network_dim", 1], "a single value cannot be rotated"),
        (["--scale_weight_norms", 1], "a rotation has no norm"),
        (["--lora_format", "comfyui"], "ComfyUI cannot read an OFT of this form"),
    ],
)
def test_what_an_oft_cannot_have_is_refused(tmp_path: Path, given: list[object], words: str) -> None:
    write_caches(tmp_path)
    family = ToyFamily()
    with pytest.raises(OptionError, match=words):
        train_network(family, toy_options(tmp_path, "--network_module", "networks.oft", *given))
    assert not family.passes


def wan_file(
    folder: Path, start: str = "diffusion_model.", blocks: int = 2
) -> tuple[Path, dict[str, Tensor]]:
    """An OFT of 4 values for the queries of a tiny Wan; also the names of the weights with their values."""
    state = tiny_state("t2v")
    paths = [f"blocks.{number}.self_attn.q" for number in range(2)]
    values = {path: angles(state[f"{path}.weight"].shape[1] // 4, 4, seed) for seed, path in enumerate(paths)}
    file = folder / "oft.safetensors"
    folder.mkdir(exist_ok=True)
    save_file({f"{start}{path}.oft_R.weight": value for path, value in values.items()}, file)
    return file, {f"{path}.weight": value for path, value in values.items()}


@pytest.mark.parametrize("start", ["base_model.model.", "transformer.", "diffusion_model."])
def test_a_file_of_another_program_is_merged(tmp_path: Path, start: str) -> None:
    path, values = wan_file(tmp_path, start)
    state = tiny_state("t2v")
    patch = LoraPatch([WeightedLora(read_lora(path), 0.7)])
    for name, weight in state.items():
        expected = (
            weight + rotate_weight(weight, compute_rotations(values[name], 0.7)) if name in values else weight
        )
        torch.testing.assert_close(patch(name, weight), expected)
    patch.check()
    assert unused(patch) == []


@torch.no_grad()
def test_next_to_the_weights_it_does_the_same(tmp_path: Path) -> None:
    """Also around a network that learns, whose input it must not rotate, and next to another rotation."""
    path, values = wan_file(tmp_path)
    uses = [WeightedLora(read_lora(path), 0.7), WeightedLora(read_lora(path), -0.3)]
    dit = tiny_dit(tmp_path / "model")
    name, value = next(iter(values.items()))
    layer = dit.get_submodule(name.removesuffix(".weight"))
    assert isinstance(layer, nn.Linear)
    x = torch.randn(2, 3, layer.in_features)
    change = sum(rotate_weight(layer.weight, compute_rotations(value, use.multiplier)) for use in uses)
    expected = nn.functional.linear(x, layer.weight + change, layer.bias)

    added = add_loras(dit, uses)
    with added.switched_on(CPU, torch.float32):
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)

    other = nn.Linear(8, 6)
    learning, region = (
        OftLayer(other, 4),
        LoraBranch(ChangedParameter("x.weight", other), read_delta({"oft_R.weight": angles(2, 4)})),
    )
    learning.oft_R.weight.data.copy_(angles(2, 4, 5))
    learning.attach()
    outer = LoraWrapper(ChangedParameter("x.weight", other), [region])
    outer.attach()
    y = torch.randn(5, 8)
    alone = other(y)
    outer.switch_on(CPU, torch.float32)
    expected = alone + nn.functional.linear(y, rotate_weight(other.weight, compute_rotations(angles(2, 4))))
    torch.testing.assert_close(other(y), expected)
    region.output_rows = slice(2, 4)
    expected[:, :2], expected[:, 4:] = alone[:, :2], alone[:, 4:]
    torch.testing.assert_close(other(y), expected)


def test_one_rotation_may_be_for_all_blocks(tmp_path: Path) -> None:
    state = tiny_state("t2v")
    weight, value = state["blocks.0.self_attn.q.weight"], angles(1, 4)
    save_file({"diffusion_model.blocks.0.self_attn.q.oft_R.weight": value}, tmp_path / "oft.safetensors")
    patch = LoraPatch([WeightedLora(read_lora(tmp_path / "oft.safetensors"))])

    merged = patch("blocks.0.self_attn.q.weight", weight)

    full = value.repeat(weight.shape[1] // 4, 1)
    torch.testing.assert_close(merged, weight + rotate_weight(weight, compute_rotations(full)))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"oft_R.weight": torch.zeros(3, 6)}, "rotates 3 blocks of 4 inputs, but the model has"),
        ({"oft_R.weight": torch.zeros(3, 5)}, "but no block size has so many values"),
        ({"oft_R.weight": torch.zeros(3, 6), "dora_scale": torch.ones(8, 1)}, "has dora_scale next to"),
        ({"oft_blocks": torch.zeros(3, 4, 4)}, "OFT in an older form than oft_R.weight"),
        ({"boft_R": torch.zeros(3, 4, 4)}, "BOFT"),
    ],
)
def test_files_that_cannot_be_used_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], words: str
) -> None:
    path = tmp_path / "oft.safetensors"
    save_file({f"lora_unet_blocks_0_self_attn_q.{part}": tensor for part, tensor in tensors.items()}, path)
    name = "blocks.0.self_attn.q.weight"
    with pytest.raises(CheckpointError, match=words):
        LoraPatch([WeightedLora(read_lora(path))])(name, tiny_state("t2v")[name])


def test_convolutions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "oft.safetensors"
    save_file({"diffusion_model.patch_embedding.oft_R.weight": torch.zeros(16, 6)}, path)
    with pytest.raises(CheckpointError, match="is not a linear layer"):
        LoraPatch([WeightedLora(read_lora(path))])("patch_embedding.weight", torch.zeros(8, 16, 1, 2, 2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_cayley_neumann": False}, "have the opposite direction"),
        ({"num_cayley_neumann_terms": 3}, "3 terms"),
    ],
)
def test_other_series_of_peft_are_refused(tmp_path: Path, settings: dict[str, object], words: str) -> None:
    path, _ = wan_file(tmp_path, "base_model.model.")
    path.rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", **settings}))
    with pytest.raises(CheckpointError, match=words):
        read_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "OFT", "use_cayley_neumann": True})
    )
    assert read_lora(tmp_path).tensors


def test_conversion_there_and_back_keeps_every_value(tmp_path: Path) -> None:
    path, values = wan_file(tmp_path)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    convert_file(path, there, "diffusers")
    convert_file(there, back, "default")

    assert set(load_file(there)) == {
        f"base_model.model.blocks.{number}.attn1.to_q.oft_R.weight" for number in range(2)
    }
    ours = {}
    for name, value in values.items():
        ours[f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.oft_R.weight"] = value
    assert same(load_file(back), ours)


def test_comfyui_gets_a_plain_lora_only(tmp_path: Path) -> None:
    path, values = wan_file(tmp_path)
    with pytest.raises(
        CheckpointError, match="ComfyUI cannot read an OFT of this form.*\n.*--bake RANK --dit MODEL"
    ):
        convert_file(path, tmp_path / "other.safetensors", "other")
    model = write_dit(tmp_path / "model", tiny_state("t2v"))
    options = ["--input", str(path), "--output", str(tmp_path / "p.safetensors"), "--target", "other"]
    with pytest.raises(OptionError, match="is an OFT .*Add --dit"):
        convert_lora.main(
            [
                "--input",
                str(path),
                "--output",
                str(tmp_path / "p.safetensors"),
                "--target",
                "other",
                "--bake",
                "64",
            ]
        )
    options = ["--input", str(path), "--output", str(tmp_path / "p.safetensors"), "--target", "other"]
    convert_lora.main([*options, "--bake", "5000", "--dit", str(model)])
    patch = LoraPatch([WeightedLora(read_lora(tmp_path / "p.safetensors"))])
    for name, weight in tiny_state("t2v").items():
        expected = (
            weight + rotate_weight(weight, compute_rotations(values[name])) if name in values else weight
        )
        torch.testing.assert_close(patch(name, weight), expected, rtol=1e-4, atol=1e-4)


def test_an_oft_for_samples_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    path, _ = wan_file(tmp_path)
    dit = load_dit(write_dit(tmp_path / "model", tiny_state("t2v")), Placement(CPU))
    with torch.no_grad():
        plain = dit(**inputs(dit))
        added = add_loras(dit, [WeightedLora(read_lora(path))])
        assert torch.equal(dit(**inputs(dit)), plain)
        with added.switched_on(CPU, torch.float32):
            assert not torch.allclose(dit(**inputs(dit)), plain)
