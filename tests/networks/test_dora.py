"""DoRA: the recorded weights of LyCORIS, and models of diffusers with PEFT's adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoints.stored.forms import QuantizationFormat, attach
from checkpoints.stored.fp8 import Fp8
from checkpoints.stored.int8 import Int8
from checkpoints.stored.nf4 import Nf4
from modules.errors import CheckpointError
from modules.speed_options import Quantization
from networks.apply import LoraPatch
from networks.convert import convert_file
from networks.delta import read_delta
from networks.kinds.dora_change import decompose
from networks.loading import LoraFile, WeightedLora, read_lora
from networks.lora_layer import LoraLayer
from networks.train.dora import extend
from tests.hunyuan_model import making as hunyuan
from tests.networks.making import add_lora, inputs, tiny_dit
from tests.networks.test_key_formats import TOLERANCE, run_there
from tests.training.conftest import _fresh_accelerator  # noqa: F401
from tests.wan.making import in_diffusers

RECORDED = load_file(Path(__file__).parents[1] / "data" / "lycoris_dora.safetensors")
CASES = sorted({name.partition("/")[0] for name in RECORDED if " " in name})
MODULE = "blocks.0.ffn.0"


def lora_of(factors: dict[str, Tensor], module: str = MODULE) -> LoraFile:
    """A file with these factors of one module."""
    name = f"lora_unet_{module.replace('.', '_')}"
    assert read_delta(factors).find_error() is None
    return LoraFile(Path("x"), {f"{name}.{part}": tensor for part, tensor in factors.items()}, {}, "ours")


def recorded(case: str) -> dict[str, Tensor]:
    tensors = {
        name.partition("/")[2]: tensor for name, tensor in RECORDED.items() if name.startswith(f"{case}/")
    }
    return {part: tensor for part, tensor in tensors.items() if part not in {"merged", "half"}}


def merged(weight: Tensor, lora: LoraFile, multiplier: float = 1.0, module: str = MODULE) -> Tensor:
    patch = LoraPatch([WeightedLora(lora, multiplier)])
    out = patch(f"{module}.weight", weight)
    patch.check()
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_merged_weight_is_that_of_lycoris(case: str) -> None:
    weight, lora = RECORDED[f"{case.split()[0]}/weight"], lora_of(recorded(case))
    assert len(CASES) == 2 * 3 * 2

    torch.testing.assert_close(merged(weight, lora), RECORDED[f"{case}/merged"], rtol=1e-5, atol=1e-6)
    if f"{case}/half" in RECORDED:
        torch.testing.assert_close(merged(weight, lora, 0.5), RECORDED[f"{case}/half"], rtol=1e-5, atol=1e-6)
    assert torch.equal(merged(weight, lora, 0.0), weight)
    assert (merged(weight, lora) - weight).abs().max() > 0.05


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_that_is_changed_some_rows_at_a_time_gets_the_norms_of_the_whole(axis: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1100, 1000, generator=generator)
    factors = {
        "lora_down.weight": torch.randn(2, 1000, generator=generator),
        "lora_up.weight": torch.randn(1100, 2, generator=generator),
    }
    magnitudes = torch.rand(weight.shape[axis], generator=generator).unsqueeze(1 - axis) + 1

    out = merged(weight, lora_of(factors | {"dora_scale": magnitudes}))

    expected = weight + decompose(weight, factors["lora_up.weight"] @ factors["lora_down.weight"], magnitudes)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.norm(dim=1 - axis), magnitudes.flatten(), rtol=1e-4, atol=1e-4)


def test_magnitudes_of_another_size_are_named() -> None:
    factors = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(6, 2)}
    lora = lora_of(factors | {"dora_scale": torch.ones(5, 1)})
    with pytest.raises(CheckpointError, match=r"it has 5 DoRA magnitudes, the model \[6, 4\]"):
        merged(torch.ones(6, 4), lora)


def add_dora(theirs: Any, targets: Any) -> None:
    """Give a model of diffusers a random DoRA."""
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=3, target_modules=targets, use_dora=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("target", [None, "default", "other"])
def test_a_dora_that_diffusers_saves_acts_on_wan_as_there(tmp_path: Path, target: str | None) -> None:
    dit = tiny_dit(tmp_path)
    theirs = in_diffusers(dit.config, dit.state_dict())
    plain = run_there(theirs, dit)
    add_dora(theirs, ["to_q", "to_out.0", "net.0.proj", "time_proj", "proj_out"])
    theirs.save_lora_adapter(tmp_path, weight_name="dora.safetensors")
    path = tmp_path / "dora.safetensors"
    if target is not None:
        convert_file(path, tmp_path / "converted.safetensors", target)
        path = tmp_path / "converted.safetensors"
        assert sum(name.endswith(".dora_scale") for name in load_file(path)) == len(read_lora(path).modules())

    expected = run_there(theirs, dit)

    torch.testing.assert_close(add_lora(dit, path)(**inputs(dit)), expected, **TOLERANCE)
    assert (expected - plain).abs().max() > 0.05


@pytest.mark.slow_cases("None", "other")
@pytest.mark.parametrize("target", [None, "default", "other"])
def test_a_dora_for_the_parts_of_fused_weights_acts_on_hunyuan_video_as_there(
    tmp_path: Path, target: str | None
) -> None:
    theirs = hunyuan.in_diffusers("t2v")
    add_dora(theirs, r".*\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|proj_mlp|net\.2)")
    theirs.save_lora_adapter(tmp_path, weight_name="dora.safetensors")
    path = tmp_path / "dora.safetensors"
    if target is not None:
        convert_file(path, tmp_path / "converted.safetensors", target, "hunyuan_video")
        path = tmp_path / "converted.safetensors"
        assert any("linear1" in name for name in load_file(path))

    out, expected = (
        add_lora(hunyuan.tiny_model("t2v"), path)(**hunyuan.tiny_inputs("t2v")),
        hunyuan.run_there(theirs, hunyuan.tiny_inputs("t2v")),
    )

    torch.testing.assert_close(out, expected, **TOLERANCE)


def test_magnitudes_by_input_cannot_go_to_diffusers(tmp_path: Path) -> None:
    factors = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(6, 2)}
    factors["dora_scale"] = torch.ones(1, 4)
    tensors = {f"lora_unet_transformer_blocks_0_attn_to_q.{part}": one for part, one in factors.items()}
    save_file(tensors, tmp_path / "x.safetensors", {"ss_base_model_version": "framepack"})

    message = "its DoRA magnitudes are by input, but diffusers has them by output"
    with pytest.raises(CheckpointError, match=message):
        convert_file(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "other")


FUSED = {"lora_down.weight": torch.rand(2, 4), "lora_up.weight": torch.rand(18, 2)}


@pytest.mark.parametrize(("place", "letter"), enumerate("qkv"))
def test_a_dora_for_a_fused_weight_is_cut_up_with_its_magnitudes(place: int, letter: str) -> None:
    weight, rows, fused = torch.rand(18, 4), slice(6 * place, 6 * place + 6), "double_blocks.0.img_attn_qkv"
    lora = lora_of(FUSED | {"dora_scale": torch.rand(18, 1) + 1}, fused)

    part = merged(weight[rows], lora, module=f"transformer_blocks.0.attn.to_{letter}")

    torch.testing.assert_close(part, merged(weight, lora, module=fused)[rows])


CPU = torch.device("cpu")


def random_layer(
    bias: bool = True, form: QuantizationFormat | None = None
) -> tuple[nn.Linear, Tensor, LoraLayer]:
    """A layer, its weight as it counts, and a DoRA with random values."""
    torch.manual_seed(2)
    original = nn.Linear(16, 24, bias=bias).requires_grad_(False)
    weight = original.weight.detach().clone()
    if form is not None:
        stored = form.quantize(weight)
        attach(original, stored)
        weight = stored.dequantize()
    layer = LoraLayer(original, 3, 1.5)
    extend(layer)
    assert isinstance(layer.dora_scale, nn.Parameter)
    nn.init.normal_(layer.lora_up.weight)
    layer.dora_scale.data *= 1 + 0.3 * torch.rand(24, 1)
    return original, weight, layer


# of few tokens, which int8 layers multiply by the value of their weight
@pytest.mark.parametrize(
    ("bias", "form"),
    [(True, None), (False, None), (True, Fp8(Quantization("rows"))), (True, Int8()), (True, Nf4())],
    ids=["bias", "plain", "fp8", "int8", "nf4"],
)
def test_the_output_is_that_of_the_weight_that_generation_makes(
    bias: bool, form: QuantizationFormat | None
) -> None:
    original, weight, layer = random_layer(bias, form)
    x = torch.randn(2, 5, 16)
    factors = layer.state_dict()
    assert factors.keys() == {"alpha", "lora_down.weight", "lora_up.weight", "dora_scale"}
    delta = read_delta(factors).compute_change(CPU)
    assert delta is not None
    merged = weight + 0.5 * decompose(weight, delta, factors["dora_scale"])
    layer.multiplier = 0.5
    layer.attach()

    with torch.no_grad():
        found = original(x)
    torch.testing.assert_close(found, nn.functional.linear(x, merged, original.bias), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_with_the_norm_as_a_constant() -> None:
    original, weight, layer = random_layer()
    x, seen = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 24)
    layer.attach()
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad((original(x) * seen).sum(), leaves)

    full = weight + layer.scale * layer.lora_up.weight @ layer.lora_down.weight
    norm = torch.linalg.vector_norm(full.detach(), dim=1, keepdim=True)
    assert isinstance(layer.dora_scale, nn.Parameter)
    out = nn.functional.linear(x, layer.dora_scale * full / norm, original.bias)
    for mine, theirs in zip(found, torch.autograd.grad((out * seen).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
