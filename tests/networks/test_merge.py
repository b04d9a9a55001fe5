"""LoRAs added to weights while a model is loaded; fused layers with factors of their own; LoRA-GGPO."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lumina.configs import DIT as LUMINA_DIT
from modules.speed_options import Quantization
from networks.apply import LoraPatch, OriginalWeights
from networks.delta import read_delta
from networks.loading import LoraFile, WeightedLora, read_lora, read_weighted_loras
from networks.lora_network import OwnNetwork
from networks.metadata import save_network
from networks.module_factors import group_by_module
from networks.unmerged_loras import add_unmerged
from networks.use_options import LoraOptions, LoraPatternOptions
from protocols.loading import Placement
from tests.golden_cases import read_case
from tests.networks.making import golden_dit, golden_lora
from tests.networks.test_lora_image_families import skeleton
from tests.tiny.loras import make_lora, unused
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.checkpoints import load_dit


def lora_file(tensors: dict[str, Tensor], name: str = "x.safetensors") -> LoraFile:
    return LoraFile(Path(name), tensors, {}, "ours")


def test_merged_weights_equal_the_recorded_ones() -> None:
    description, expected = read_case("lora_merge_convert")
    dit = golden_dit(description)
    network = make_lora("lora_wan", description["rank"], description["alpha"], dit)
    tensors = golden_lora(network, description["lora_weights_model_key"], description["lora_up_extra_scale"])
    patch = LoraPatch([WeightedLora(lora_file(tensors), description["multiplier"])])

    merged = {name: patch(name, weight) for name, weight in dit.state_dict().items()}

    assert [
        name for name, weight in dit.state_dict().items() if not torch.equal(weight, merged[name])
    ] == description["merged_changed_tensors"]
    for name in (name for name in expected if name.startswith("merged.")):
        torch.testing.assert_close(
            merged[name[7:]], expected[name], rtol=0, **description["tolerance"]["merged.*"]
        )
    assert unused(patch) == []
    patch.check()


def test_several_loras_are_summed_before_rounding() -> None:
    weight = torch.full((4, 4), 256.0, dtype=torch.bfloat16)  # neighbors are 2 apart
    one = {
        "lora_unet_a.lora_down.weight": torch.full((1, 4), 0.6),
        "lora_unet_a.lora_up.weight": torch.ones(4, 1),
    }
    patch = LoraPatch([WeightedLora(lora_file(one)), WeightedLora(lora_file(one))])

    # 257.2: one alone would be lost
    assert torch.equal(patch("a.weight", weight), torch.full((4, 4), 258.0, dtype=torch.bfloat16))


def test_a_merged_weight_is_rounded_once() -> None:
    weight = torch.full((4, 4), 256.0, dtype=torch.bfloat16)  # neighbors are 2 apart
    change = {"lora_unet_a.diff": torch.full((4, 4), 1.003)}  # 1.0 in bf16: 257 would become 256

    changed = LoraPatch([WeightedLora(lora_file(change))])("a.weight", weight)

    assert torch.equal(changed, torch.full((4, 4), 258.0, dtype=torch.bfloat16))


ROWS, COLUMNS = 2100, 1024  # more than is changed at once
LARGE: dict[str, dict[str, tuple[int, ...]]] = {
    "LoRA": {"lora_down.weight": (2, COLUMNS), "lora_up.weight": (ROWS, 2)},
    "whole": {"diff": (ROWS, COLUMNS)},
    "LoHa": {
        "hada_w1_a": (ROWS, 2),
        "hada_w1_b": (2, COLUMNS),
        "hada_w2_a": (ROWS, 2),
        "hada_w2_b": (2, COLUMNS),
    },
    "LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (ROWS // 2, 2), "lokr_w2_b": (2, COLUMNS // 2)},
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_weight_changed_part_by_part_equals_one_changed_at_once(kind: str) -> None:
    factors = {
        part: torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for part, shape in LARGE[kind].items()
    }
    patch = LoraPatch(
        [WeightedLora(lora_file({f"lora_unet_a.{part}": tensor for part, tensor in factors.items()}), 0.5)]
    )
    weight = torch.ones(ROWS, COLUMNS)
    expected = read_delta(factors).compute_change(torch.device("cpu"))
    assert expected is not None

    changed = patch("a.weight", weight)

    torch.testing.assert_close(changed, 1 + 0.5 * expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(weight, torch.ones(ROWS, COLUMNS))
    assert patch.add_to("a.weight", weight).data_ptr() == weight.data_ptr()
    assert torch.equal(weight, changed)


def test_options_become_uses_with_missing_multipliers_one(tmp_path: Path) -> None:
    files = (tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    for file in files:
        save_file({"lora_unet_a.diff": torch.ones(2, 2)}, file)
    options = LoraOptions.from_defaults(lora_weight=files, lora_multiplier=(0.5,))

    uses = read_weighted_loras(
        [*zip(files, options.multipliers(), strict=True)],
        LoraPatternOptions.from_defaults(include_patterns=("a",)),
    )

    found = [(use.multiplier, use.include, use.exclude) for use in uses]
    assert found == [(0.5, "a", None), (1.0, None, None)]


def test_patterns_for_files_fit_with_dots_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"lora_unet_blocks_{n}_self_attn_q" for n in (1, 11)]
    save_file({f"{name}.diff": torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    files = [(tmp_path / "x.safetensors", 1.0)]
    for pattern, kept in [
        (r"blocks\.1\.self_attn", [True, False]),
        ("blocks_1_", [True, False]),
        ("blocks.1", [True, True]),
        (r"blocks\.2\.", [False, False]),
    ]:
        (use,) = read_weighted_loras(files, LoraPatternOptions.from_defaults(include_patterns=(pattern,)))
        assert [use.selects(["diff"], name) for name in names] == kept
    for typed in (None, ("blocks_1_",)):  # what an option excludes beside them may fit nothing
        patterns = LoraPatternOptions.from_defaults(exclude_patterns=typed).also_excluding(
            "single_blocks|q$", 1
        )
        (use,) = read_weighted_loras(files, patterns)
        assert [use.selects(["diff"], name) for name in names] == [typed is None, True]
        assert not use.selects(["diff"], "lora_unet_single_blocks_1")
        assert "option" not in str(use.exclude)

    (said,) = caplog.messages
    assert "blocks" in said
    assert "matches no name" in said


NAME = "blocks.0.self_attn.q.weight"


def network(dtype: torch.dtype) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    model.blocks[0].self_attn = nn.ModuleDict({"q": nn.Linear(8, 8, bias=False, dtype=dtype)})
    return model.requires_grad_(False)


def lora(folder: Path, seed: int, size: int = 8) -> WeightedLora:
    generator = torch.Generator().manual_seed(seed)
    base = "lora_unet_blocks_0_self_attn_q"
    tensors = {
        f"{base}.lora_down.weight": torch.randn(2, size, generator=generator),
        f"{base}.lora_up.weight": torch.randn(size, 2, generator=generator),
        f"{base}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, folder / f"{seed}.safetensors")
    return WeightedLora(read_lora(folder / f"{seed}.safetensors"), 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_equal_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = torch.randn(8, 8, generator=torch.Generator().manual_seed(9))  # float32, as in the file
    uses = [lora(tmp_path, 1), lora(tmp_path, 2)]
    model, originals = network(dtype), OriginalWeights(uses)
    weight = model.get_parameter(NAME)
    weight.copy_(originals(NAME, stored))
    originals.check()
    plain = weight.clone()

    for chosen in ([uses[0]], [uses[1]], uses, [uses[0]]):
        originals.switch(model, chosen)
        expected = torch.empty_like(weight).copy_(LoraPatch(chosen)(NAME, stored))
        assert torch.equal(weight, expected)
        assert not torch.equal(weight, plain)

    originals.switch(model, [])
    assert torch.equal(weight, plain)


CPU = torch.device("cpu")


@torch.no_grad()
def test_next_to_weights_in_8_bits_a_bias_changes_once(tmp_path: Path) -> None:
    path, name = write_dit(tmp_path, tiny_state("t2v"), "fp8_scaled"), "blocks.0.ffn.0"
    placement = Placement(CPU, compute_dtype=torch.float32, quantization=Quantization("cast"))
    plain = load_dit(path, placement).get_submodule(name)
    x = torch.randn(3, plain.in_features, generator=torch.Generator().manual_seed(0))
    tensors = {
        f"lora_unet_{name.replace('.', '_')}.{part}": tensor
        for part, tensor in {
            "lora_down.weight": torch.ones(2, plain.in_features),
            "lora_up.weight": torch.ones(plain.out_features, 2),
            "diff_b": torch.ones(plain.out_features),
        }.items()
    }
    patch = LoraPatch([WeightedLora(lora_file(tensors), 0.5)])

    dit = load_dit(path, replace(placement, patch=patch, leave_unmerged=patch.leave_unmerged))
    add_unmerged(dit, patch.unmerged, CPU, torch.float32)

    assert [*patch.unmerged] == [f"{name}.weight"]
    expected = plain(x) + 0.5 * (2 * x.sum(-1, keepdim=True) + 1)
    torch.testing.assert_close(
        dit.get_submodule(name)(x), expected, rtol=1e-3, atol=1e-2
    )  # biases in bfloat16


QKV, LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"


def small(**arguments: str) -> tuple[nn.Module, OwnNetwork]:
    """A network of three layers, 6 wide, and its LoRA of rank 2 and alpha 1 with random factors."""
    shapes = {QKV: (18, 6), LINEAR1: (42, 6), "single_blocks.0.linear2": (6, 30)}
    dit = skeleton(shapes).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    made: OwnNetwork = make_lora("lora_flux", 2, 1.0, dit, **arguments)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    made.attach()
    return dit, made


def test_files_have_the_recorded_tensors_and_alphas() -> None:
    case, _ = read_case("lora_flux_split_qkv")
    table = case["lora"]["modules_name_in_out"]
    paths = {name: name.removeprefix("lora_unet_") for name, _, _ in table}
    for text in ("blocks_", "img_attn_", "txt_attn_", "img_mlp_", "txt_mlp_", "img_mod_", "txt_mod_"):
        paths = {name: path.replace(text, text[:-1] + ".") for name, path in paths.items()}
    for number in "01":
        paths = {n: p.replace(f"blocks.{number}_", f"blocks.{number}.") for n, p in paths.items()}
    paths = {name: path.replace("modulation_", "modulation.") for name, path in paths.items()}
    dit = skeleton(
        {
            paths[name]: (sum(rows) if isinstance(rows, list) else rows, columns)
            for name, columns, rows in table
        }
    )

    made = make_lora("lora_flux", 4, 2.0, dit, split_qkv="True")

    stored = made.state_dict()
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == dict(case["file"]["tensors"])
    for name, alpha in case["file"]["alpha"].items():
        assert float(stored[f"{name}.alpha"]) == alpha


@pytest.mark.parametrize("path", [QKV, LINEAR1])
def test_each_part_learns_with_factors_of_its_own(path: str) -> None:
    dit, made = small(split_qkv="True")
    layer = dit.get_submodule(path)
    name = "lora_unet_" + path.replace(".", "_")
    x = torch.randn(3, 6)

    out = layer(x)

    factors = group_by_module(made.state_dict())[name]
    delta = read_delta(factors).compute_change(CPU)
    assert delta is not None
    torch.testing.assert_close(out, nn.functional.linear(x, layer.weight + delta, layer.bias))
    parts = len(factors["lora_down.weight"]) // 2
    up = factors["lora_up.weight"]  # the rows of q know the first two ranks only
    assert up[:6, 2:].count_nonzero() == 0
    assert float(factors["alpha"]) == parts
    assert made.get_parameter(f"{name}.lora_up.weight").shape == (len(up), 2)


def test_a_file_with_split_factors_goes_back_into_them(tmp_path: Path) -> None:
    _, made = small(split_qkv="True")
    save_network(made, tmp_path / "lora.safetensors", None, {})
    _, other = small(split_qkv="True")
    with torch.no_grad():
        other.get_parameter("lora_unet_single_blocks_0_linear1.lora_up.weight").zero_()

    other.load_weights(tmp_path / "lora.safetensors")

    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_split_files_of_sd_scripts_have_the_strength_that_they_were_trained_with(tmp_path: Path) -> None:
    _, made = small(split_qkv="True")
    state = made.state_dict()
    theirs = {name: torch.tensor(1.0) if name.endswith("alpha") else tensor for name, tensor in state.items()}
    metadata = {"ss_network_args": json.dumps({"split_qkv": "True"}), "ss_network_alpha": "1.0"}
    save_file(theirs, tmp_path / "theirs.safetensors", metadata)
    save_file(state, tmp_path / "ours.safetensors", metadata)
    save_file(theirs, tmp_path / "unsaid.safetensors")

    read = {
        name: read_lora(tmp_path / f"{name}.safetensors").tensors for name in ("theirs", "ours", "unsaid")
    }

    alpha = "lora_unet_single_blocks_0_linear1.alpha"
    assert [float(tensors[alpha]) for tensors in read.values()] == [4, 4, 1]


def test_keys_and_values_with_fewer_heads_are_parts_too() -> None:
    dit = skeleton({"layers.0.attention.qkv": (10, 6)}, LUMINA_DIT)

    made = make_lora("lora_lumina", 2, 1.0, dit, split_qkv="True")

    assert made.layers[0].lora_up.split_sizes == (6, 2, 2)


def test_norms_of_split_layers_are_limited_by_their_whole_change() -> None:
    _, made = small(split_qkv="True")
    with torch.no_grad():
        made.scale_norms(0.5, torch.device("cpu"))

    for factors in group_by_module(made.state_dict()).values():
        delta = read_delta(factors).compute_change(CPU)
        assert delta is not None
        assert float(delta.norm()) <= 0.5 * (1 + 1e-5)


def strengths(layer: nn.Module, weight: Tensor, sigma: float, beta: float) -> Tensor:
    """The formula of the paper, with whole matrices."""
    up, down = layer.lora_up.weight, layer.lora_down.weight
    gradient = layer.scale * (up @ down.grad + up.grad @ down)
    base = weight.norm(dim=1).mean()
    norms = (base**2 + (up @ down).square().sum(1)).sqrt()
    return (sigma * norms + beta * gradient.square().sum(1)) / math.sqrt(len(weight))


def test_noise_on_weights_is_as_strong_as_weights_and_gradients() -> None:
    dit, made = small(ggpo_sigma="0.03", ggpo_beta="0.01")
    layer, lora = dit.get_submodule(QKV), made.get_submodule("lora_unet_double_blocks_0_img_attn_qkv")
    x = torch.randn(4, 6, requires_grad=True)
    made.set_dropout_seed(5)
    calm = layer(x)
    calm.square().sum().backward()

    made.before_optimizer_step()

    expected = strengths(lora, layer.weight, 0.03, 0.01)
    torch.testing.assert_close(getattr(*lora.ggpo_noise_buffer), expected)
    noisy = layer(x)
    assert torch.equal(noisy, layer(x))
    assert not torch.equal(noisy, calm)
    made.set_dropout_seed(6)
    assert not torch.equal(noisy, layer(x))
    made.eval()
    assert torch.equal(layer(x), calm)


def test_gradients_of_inputs_go_through_the_noise_that_the_output_had() -> None:
    dit, made = small(ggpo_sigma="0.5", ggpo_beta="0")
    layer = dit.get_submodule(QKV)
    made.set_dropout_seed(5)
    layer(torch.randn(4, 6)).sum().backward()
    made.before_optimizer_step()
    x = torch.randn(1, 6, requires_grad=True)

    (gradient,) = torch.autograd.grad(layer(x).sum(), x)

    unit = torch.eye(6)
    matrix = layer(unit) - layer(torch.zeros(6, 6))  # the layer's whole matrix, noise and all
    torch.testing.assert_close(gradient, matrix.sum(1)[None], rtol=1e-4, atol=1e-4)


def test_noise_is_saved_beside_the_file() -> None:
    _, made = small(ggpo_sigma="0.03", ggpo_beta="0.01")

    assert set(made.additional_state) == {"ggpo"}
    assert len(made.additional_state["ggpo"].state_dict()) == len(made.layers)
    assert not any("ggpo" in name for name in made.state_dict())
