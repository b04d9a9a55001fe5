"""`set_weight` of LoRA files takes the place of a model's weight, wherever LoRAs are applied."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convert_lora
import merge_lora
from modules.errors import CheckpointError
from networks.apply import LoraPatch
from networks.gated_loras import add_loras
from networks.loading import LoraFile, WeightedLora, read_lora
from networks.rounding import LoraRounding
from networks.use_options import AUTO, STOCHASTIC

WIDTH = 8
QKV, PROJ = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj"
SCALE = "double_blocks.0.img_attn.norm.query_norm.scale"
MODEL = {
    f"{QKV}.weight": (3 * WIDTH, WIDTH),
    f"{PROJ}.weight": (WIDTH, WIDTH),
    f"{PROJ}.bias": (WIDTH,),
    SCALE: (WIDTH,),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Path:
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def merged(folder: Path, *loras: tuple[Path, float], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights of a part of FLUX with these LoRAs merged by the script."""
    stored = {name: drawn(*shape, seed=9).to(dtype) for name, shape in MODEL.items()}
    model = write(folder, "model", stored)
    output = folder / "merged.safetensors"
    files = [str(path) for path, _ in loras]
    strengths = [str(strength) for _, strength in loras]
    words = ["--dit", str(model), "--save_merged_model", str(output), "--device", "cpu"]
    merge_lora.main([*words, "--lora_weight", *files, "--lora_multiplier", *strengths])
    return load_file(output)


def plain_lora(folder: Path) -> tuple[Path, Tensor]:
    """A LoRA of PROJ and the change that it makes at strength 1."""
    down, up = drawn(2, WIDTH, seed=3), drawn(WIDTH, 2, seed=4)
    names = {f"diffusion_model.{PROJ}.lora_A.weight": down, f"diffusion_model.{PROJ}.lora_B.weight": up}
    return write(folder, "plain", names), up @ down


@pytest.mark.parametrize("name", [f"{PROJ}.weight", SCALE, f"{QKV}.weight"])
@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_a_weight_is_set_at_any_strength(tmp_path: Path, name: str, strength: float) -> None:
    values = 1000 * drawn(*MODEL[name], seed=1)
    key = f"diffusion_model.{name.removesuffix('.weight')}.set_weight"
    bias = drawn(WIDTH, seed=2)
    tensors = {key: values, f"diffusion_model.{PROJ}.diff_b": bias}

    after = merged(tmp_path, (write(tmp_path, "set", tensors), strength))

    before = load_file(tmp_path / "model.safetensors")
    expected = before | {name: values, f"{PROJ}.bias": before[f"{PROJ}.bias"] + strength * bias}
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(after[name], values)


def test_strength_0_sets_nothing(tmp_path: Path) -> None:
    lora = write(tmp_path, "set", {f"diffusion_model.{PROJ}.set_weight": drawn(WIDTH, WIDTH, seed=1)})
    after = merged(tmp_path, (lora, 0.0))
    before = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_earlier_files_are_replaced_and_later_ones_added(tmp_path: Path) -> None:
    values = drawn(WIDTH, WIDTH, seed=1)
    lora, change = plain_lora(tmp_path)
    sets = write(tmp_path, "set", {f"diffusion_model.{PROJ}.set_weight": values})

    last = merged(tmp_path, (lora, 1.0), (sets, 0.5))
    first = merged(tmp_path, (sets, 0.5), (lora, 2.0))

    assert torch.equal(last[f"{PROJ}.weight"], values)
    torch.testing.assert_close(first[f"{PROJ}.weight"], values + 2 * change)


def test_rows_of_a_joined_layer_are_set(tmp_path: Path) -> None:
    values = drawn(WIDTH, WIDTH, seed=1)
    lora = write(tmp_path, "set", {"transformer.transformer_blocks.0.attn.to_k.set_weight": values})
    after = merged(tmp_path, (lora, 1.0))
    expected = load_file(tmp_path / "model.safetensors")[f"{QKV}.weight"]
    expected[WIDTH : 2 * WIDTH] = values
    assert torch.equal(after[f"{QKV}.weight"], expected)


def test_other_parts_of_the_same_weight_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lora, _ = plain_lora(tmp_path)
    values = drawn(WIDTH, WIDTH, seed=1)
    both = write(tmp_path, "both", load_file(lora) | {f"diffusion_model.{PROJ}.set_weight": values})
    after = merged(tmp_path, (both, 1.0))
    assert torch.equal(after[f"{PROJ}.weight"], values)
    assert "set_weight replaces the other changes of 1 weight, as in ComfyUI" in caplog.text


def test_another_shape_is_refused(tmp_path: Path) -> None:
    lora = write(tmp_path, "set", {f"diffusion_model.{PROJ}.set_weight": drawn(WIDTH, 2 * WIDTH)})
    with pytest.raises(CheckpointError, match=rf"for {PROJ}.weight it has \[8, 16\], the model \[8, 8\]"):
        merged(tmp_path, (lora, 1.0))


@pytest.mark.parametrize("rule", [AUTO, STOCHASTIC])
def test_a_set_weight_is_rounded_once(rule: str) -> None:
    values = drawn(WIDTH, WIDTH, seed=1).bfloat16()
    lora = LoraFile(Path("set"), {"lora_unet_x.set_weight": values}, {}, "ours")
    patch = LoraPatch([WeightedLora(lora)], rounding=LoraRounding(rule))
    weight = patch("x.weight", drawn(WIDTH, WIDTH, seed=2).bfloat16())
    assert torch.equal(weight, values)


class Small(nn.Module):
    """A convolution, a matrix and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.conv(x).movedim(1, -1)))


@torch.no_grad()
@pytest.mark.parametrize("order", [("set", "lora"), ("lora", "set"), ("set", "set again")])
def test_added_at_run_time_and_folded_in_are_the_same(order: tuple[str, ...]) -> None:
    def sets(seed: int) -> dict[str, Tensor]:
        return {
            "lora_unet_conv.set_weight": drawn(WIDTH, WIDTH, 3, 3, seed=seed),
            "lora_unet_conv.diff_b": drawn(WIDTH, seed=seed + 1),
            "lora_unet_proj.set_weight": drawn(WIDTH, WIDTH, seed=seed + 2),
            "lora_unet_norm.set_weight": drawn(WIDTH, seed=seed + 3),
        }

    changes = {
        "lora_unet_conv.lora_down.weight": drawn(2, WIDTH, 3, 3, seed=31),
        "lora_unet_conv.lora_up.weight": drawn(WIDTH, 2, 1, 1, seed=32),
        "lora_unet_proj.diff": drawn(WIDTH, WIDTH, seed=33),
        "lora_unet_proj.diff_b": drawn(WIDTH, seed=34),
        "lora_unet_norm.diff": drawn(WIDTH, seed=35),
        "lora_unet_norm.diff_b": drawn(WIDTH, seed=36),
    }
    files = {"set": sets(10), "set again": sets(20), "lora": changes}
    uses = [WeightedLora(LoraFile(Path(name), files[name], {}, "ours"), 0.5) for name in order]
    folded = Small()
    LoraPatch(uses).bake(folded)
    model = Small()
    loras = add_loras(model, uses)
    x = drawn(1, WIDTH, 4, 4)
    plain = model(x)

    with loras.switched_on(torch.device("cpu"), torch.float32):
        torch.testing.assert_close(model(x), folded(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("target", ["default", "other"])
def test_converting_keeps_it(tmp_path: Path, target: str) -> None:
    values = {f"diffusion_model.{SCALE}.set_weight": drawn(WIDTH), f"{PROJ}.set_weight": drawn(WIDTH, WIDTH)}
    lora = write(tmp_path, "set", values)
    output = tmp_path / "converted.safetensors"
    words = ["--input", str(lora), "--output", str(output), "--target", target, "--family", "flux"]
    convert_lora.main(words)
    start, separator = ("lora_unet_", "_") if target == "default" else ("diffusion_model.", ".")
    expected = {f"{start}{name.replace('.', separator)}.set_weight" for name in (SCALE, PROJ)}
    assert load_file(output).keys() == expected
    torch.testing.assert_close(read_lora(output).tensors, read_lora(lora).tensors, rtol=0, atol=0)


def test_diffusers_has_no_form_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lora, _ = plain_lora(tmp_path)
    both = write(tmp_path, "both", load_file(lora) | {f"diffusion_model.{SCALE}.set_weight": drawn(WIDTH)})
    output = tmp_path / "converted.safetensors"
    words = ["--input", str(both), "--output", str(output), "--target", "diffusers", "--family", "flux"]
    convert_lora.main(words)
    assert "1 modules are left out" in caplog.text
    assert "query_norm_scale" in caplog.text
