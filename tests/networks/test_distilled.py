"""Distillation LoRAs, which also change biases, norms, convolutions and the modulation of Wan's blocks.

Names as LightX2V writes them. The oracle is a plain sum of tensors, made here.
"""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.contract.loading import Placement
from networks.added import add_loras
from networks.apply import LoraPatch
from networks.convert import convert_file
from networks.loading import LoraUse, read_lora
from tests.networks.making import inputs, tiny_dit
from tests.networks.test_key_formats import TOLERANCE, load_there, run_there
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.wan.making import in_diffusers
from wan.checkpoints import load_dit

CPU = torch.device("cpu")
STRENGTH = 0.7
RANK = 2


def random(*shape: int, seed: int) -> Tensor:
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distilled(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA as LightX2V extracts it, for every parameter, and what it adds to each in float32."""
    written: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for seed, (name, weight) in enumerate(state.items()):
        path, _, leaf = name.rpartition(".")
        start = f"diffusion_model.{path}"
        if leaf == "weight" and weight.ndim == 2 and "head" not in name:
            down, up = random(RANK, weight.shape[1], seed=seed), random(len(weight), RANK, seed=seed + 1000)
            written |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
            deltas[name] = up @ down
        else:
            kind = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[leaf]
            written[f"{start}.{kind}"] = deltas[name] = random(*weight.shape, seed=seed)
    return written, deltas


class Case:
    """A tiny Wan on disk, a LoRA for all of it, and the sum of both."""

    def __init__(self, folder: Path, kind: str = "t2v", dialect: str = "safetensors") -> None:
        self.state = tiny_state(kind)
        self.model = write_dit(folder / "model", self.state, dialect)
        written, self.deltas = distilled(self.state)
        self.path = folder / "lora.safetensors"
        save_file(written, self.path)
        self.use = LoraUse(read_lora(self.path), STRENGTH)
        self.merged = {name: tensor + STRENGTH * self.deltas[name] for name, tensor in self.state.items()}

    def assert_merged(self, found: dict[str, Tensor]) -> None:
        for name, wanted in self.merged.items():
            # one rounding of float32 apart: the strength is multiplied in at another place
            torch.testing.assert_close(found[name].float(), wanted, rtol=1e-6, atol=1e-6, msg=name)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize("modulation", ["diff_m", "modulation.diff"])
def test_loading_adds_every_difference(case: Case, modulation: str, caplog: pytest.LogCaptureFixture) -> None:
    written = {name.replace("diff_m", modulation): tensor for name, tensor in load_file(case.path).items()}
    save_file(written, case.path)
    patch = LoraPatch([LoraUse(read_lora(case.path), STRENGTH)], model=case.model)

    dit = load_dit(case.model, Placement(CPU, patch=patch))
    patch.check()

    case.assert_merged(dit.state_dict())
    assert patch.unused() == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@torch.no_grad()
def test_a_lora_for_samples_adds_every_difference_and_leaves_nothing(tmp_path: Path, case: Case) -> None:
    dit = tiny_dit(tmp_path / "other")
    plain, given = dit(**inputs(dit)), inputs(dit)
    added = add_loras(dit, [LoraUse(case.use.lora, STRENGTH)])

    with added.switched_on(CPU, torch.float32):
        found = dit(**given)
    again = dit(**given)

    dit.load_state_dict(case.merged)
    torch.testing.assert_close(found, dit(**given), rtol=1e-5, atol=1e-5)  # x W + x A B, not x (W + A B)
    assert torch.equal(again, plain)
    assert float((found - plain).abs().max()) > 0.1


@pytest.mark.parametrize("target", ["default", "other"])
def test_conversion_keeps_every_difference(tmp_path: Path, case: Case, target: str) -> None:
    convert_file(case.path, tmp_path / "once.safetensors", target)
    convert_file(tmp_path / "once.safetensors", tmp_path / "twice.safetensors", "other")

    for name in ("once", "twice"):
        patch = LoraPatch([LoraUse(read_lora(tmp_path / f"{name}.safetensors"), STRENGTH)])
        case.assert_merged({each: patch(each, weight) for each, weight in case.state.items()})
        assert patch.unused() == []
    # the one name for it that ComfyUI reads
    assert "diffusion_model.blocks.0.modulation.diff" in load_file(tmp_path / "twice.safetensors")


def test_a_difference_of_the_first_layer_for_other_channels_is_left_out(
    tmp_path: Path, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    """LoRAs of text-to-video models are used on image-to-video models, which take more channels."""
    state = tiny_state("i2v")
    patch = LoraPatch([case.use])

    merged = {name: patch(name, weight) for name, weight in state.items()}
    patch.check()

    assert torch.equal(merged["patch_embedding.weight"], state["patch_embedding.weight"])
    assert not torch.equal(merged["patch_embedding.bias"], state["patch_embedding.bias"])
    assert "its first layer takes 16 channels, the model's 36; the rest is used without it" in caplog.text
    assert "ONLY IN PART" not in caplog.text
    caplog.clear()
    dit = tiny_dit(tmp_path / "i2v", "i2v")
    with add_loras(dit, [LoraUse(case.use.lora, 1.0)]).switched_on(CPU, torch.float32):
        dit(**inputs(dit))
    assert "its first layer takes 16 channels, the model's 36; the rest is used without it" in caplog.text


def test_image_attention_that_a_model_lacks_is_told_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """LightX2V's files for Wan2.2 I2V have what only Wan2.1 I2V has: k_img, v_img, img_emb."""
    case = Case(tmp_path, "i2v")
    patch, dit = LoraPatch([case.use]), tiny_dit(tmp_path / "t2v")
    for name, weight in tiny_state("t2v", in_dim=36).items():
        patch(name, weight)

    patch.check()
    add_loras(dit, [LoraUse(case.use.lora, 1.0)])

    assert caplog.text.count("the attention to images of Wan2.1's image-to-video models; the rest") == 2
    assert "lora_unet_blocks_0_cross_attn_k_img" in caplog.text
    assert "ONLY IN PART" not in caplog.text


@pytest.mark.parametrize("through", ["its own reader", "--target diffusers"])
def test_diffusers_makes_the_same_of_it(tmp_path: Path, case: Case, through: str) -> None:
    """As far as diffusers has a form: factors and biases of the blocks, and the last layer as a whole."""
    kept = {
        name: tensor
        for name, tensor in load_file(case.path).items()
        if "head.head" in name or (".blocks." in name and "norm" not in name and "diff_m" not in name)
    }
    save_file(kept, case.path)
    dit, path = tiny_dit(tmp_path / "again"), case.path
    if through == "--target diffusers":
        path = tmp_path / "converted.safetensors"
        convert_file(case.path, path, "diffusers")
        assert all(name.startswith("transformer.") for name in load_file(path))
    other = in_diffusers(dit.config, dit.state_dict())

    load_there(other, path)

    patch = LoraPatch([LoraUse(read_lora(case.path))])
    merged = {name: patch(name, weight) for name, weight in dit.state_dict().items()}
    found = run_there(other, dit)
    dit.load_state_dict(merged)
    assert patch.unused() == []
    torch.testing.assert_close(found, dit(**inputs(dit)), **TOLERANCE)
