"""The LoRA tools of the image families: convert, merge, extract; against recorded numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge_lora
from flux.names import FLUX
from flux_2.names import FLUX_2
from hunyuan_model.names import HUNYUAN_VIDEO
from krea2.names import KREA_2
from modules.errors import CheckpointError, OptionError
from networks import (
    convert_flux_lora,
    convert_hunyuan_image_lora_to_comfy,
    extract_lora_from_models,
    flux_extract_lora,
    flux_merge_lora,
)
from networks.apply import LoraPatch
from networks.delta import read_delta
from networks.extracting import decompose_change
from networks.fused_loras import join_parts
from networks.loading import WeightedLora, read_lora
from networks.module_factors import group_by_module
from networks.names.layouts import FamilyNames
from tests.golden_cases import draw, make_weights, read_case
from tests.tiny import krea2, z_image
from tests.tiny.flux_2 import tiny_state
from z_image.names import Z_IMAGE

CASE, TENSORS = read_case("flux_lora_tools")
CPU = torch.device("cpu")


def shapes() -> dict[str, tuple[int, int]]:
    """(out, in) of each module of the tiny FLUX."""
    table = read_case("lora_flux")[0]["lora"]["modules_name_in_out"]
    return {name: (rows, columns) for name, columns, rows in table}


def lora(name: str) -> dict[str, Tensor]:
    given = CASE["loras"][name]
    table = [
        [f"{module}.lora_{factor}.weight", size]
        for module, (rows, columns) in shapes().items()
        for factor, size in (("down", [given["rank"], columns]), ("up", [rows, given["rank"]]))
    ]
    tensors = make_weights(given["weights_model_key"], table)
    for key in tensors:
        if "lora_up" in key:
            tensors[key] = tensors[key] * CASE["loras"]["lora_up_extra_scale"]
    return tensors | {f"{module}.alpha": torch.tensor(given["alpha"]) for module in shapes()}


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.safetensors" for name in CASE["merge_lora"]["loras"]]
    for path in paths:
        save_file(lora(path.stem), path, {"ss_base_model_version": "flux1"})
    return paths


def model(path: Path) -> dict[str, Tensor]:
    table = read_case("flux_dit_guidance")[0]["weights"]
    weights = make_weights("flux_dit_guidance", table)
    save_file(weights, path)
    return weights


def deltas(path: Path) -> dict[str, Tensor]:
    found = {
        name: read_delta(factors).compute_change(CPU)
        for name, factors in group_by_module(load_file(path)).items()
    }
    return {name: delta for name, delta in found.items() if delta is not None}


def test_ai_toolkit_gets_the_recorded_tensors_and_the_way_back_changes_nothing(
    tmp_path: Path, loras: list[Path]
) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"

    convert_flux_lora.main(
        ["--src", "sd-scripts", "--dst", "ai-toolkit", "--src_path", str(loras[0]), "--dst_path", str(there)]
    )
    convert_flux_lora.main(["--src_path", str(there), "--dst_path", str(back)])

    made = load_file(there)
    assert {name: list(tensor.shape) for name, tensor in made.items()} == dict(
        CASE["to_ai_toolkit"]["tensors"]
    )
    for name, tensor in TENSORS.items():
        if name.startswith("ait."):
            torch.testing.assert_close(made[name.removeprefix("ait.")], tensor, rtol=1e-6, atol=0)
    torch.testing.assert_close(dict(deltas(back)), dict(deltas(loras[0])), rtol=1e-5, atol=1e-6)


def test_hunyuanimages_names_become_comfyuis_and_back(tmp_path: Path) -> None:
    pairs = read_case("hunyuan_image_lora_convert")[0]["modules"]
    source, there, back = (tmp_path / f"{name}.safetensors" for name in ("source", "there", "back"))
    factors = {"lora_down.weight": torch.ones(1, 2), "lora_up.weight": torch.ones(2, 1)}
    tensors = {
        f"{name}.{part}": tensor.clone()
        for i, name in enumerate(pairs)
        for part, tensor in {**factors, "alpha": torch.tensor(float(i))}.items()
    }
    save_file(tensors, source, {"ss_network_dim": "4", "sshs_model_hash": "old"})

    convert_hunyuan_image_lora_to_comfy.main([str(source), str(there)])
    convert_hunyuan_image_lora_to_comfy.main([str(there), str(back), "--reverse"])

    # the recorded pairs match names of two orders; which names there are is what they tell
    assert {name.partition(".")[0] for name in load_file(there)} == set(pairs.values())
    assert {n: t.tolist() for n, t in load_file(back).items()} == {n: t.tolist() for n, t in tensors.items()}
    assert load_file(there)["lora_unet_double_blocks_1_img_mlp_0.alpha"] == float(
        tensors["lora_unet_double_blocks_1_img_mlp_fc1.alpha"]
    )
    with safe_open(there, "pt") as file:
        assert file.metadata()["sshs_model_hash"] not in ("old", "")


def merge(loras: list[Path], *more: str) -> None:
    ratios = [str(ratio) for ratio in CASE["merge_lora"]["ratios"]]
    flux_merge_lora.main(["--models", *map(str, loras), "--ratios", *ratios, *more])


def test_a_model_gets_the_recorded_sum_in_any_precision(tmp_path: Path, loras: list[Path]) -> None:
    weights, output = model(tmp_path / "model.safetensors"), tmp_path / "merged.safetensors"
    files = ["--flux_model", str(tmp_path / "model.safetensors"), "--save_to"]

    merge(loras, *files, str(output))
    merge(loras, *files, str(tmp_path / "half.safetensors"), "--save_precision", "bf16")

    merged, half = load_file(output), load_file(tmp_path / "half.safetensors")
    changed = sorted(name for name in weights if not torch.equal(weights[name], merged[name]))
    assert changed == sorted(CASE["merge_model"]["changed"])
    for name, tensor in TENSORS.items():
        if name.startswith("merged."):
            torch.testing.assert_close(merged[name.removeprefix("merged.")], tensor, rtol=0, atol=2e-6)
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in merged.items())


def test_loras_are_added_up_exactly_or_at_the_first_ones_rank(tmp_path: Path, loras: list[Path]) -> None:
    exact, near = tmp_path / "exact.safetensors", tmp_path / "near.safetensors"

    merge(loras, "--save_to", str(exact), "--concat")
    merge(loras, "--save_to", str(near))

    made, short = deltas(exact), deltas(near)
    assert {len(t) for name, t in load_file(exact).items() if "lora_down" in name} == {
        CASE["merge_lora"]["rank_concat"]
    }
    assert {len(t) for name, t in load_file(near).items() if "lora_down" in name} == {4}
    for name, tensor in TENSORS.items():
        kind, _, module = name.partition(".")
        if kind.startswith("sum"):
            found = (made if kind == "sum" else short)[module]
            torch.testing.assert_close(found, tensor, rtol=0, atol=5e-6)
    ratios, parts = CASE["merge_lora"]["ratios"], [deltas(path) for path in loras]
    for name, delta in made.items():
        full = sum(ratio * part[name] for ratio, part in zip(ratios, parts, strict=True))
        torch.testing.assert_close(delta, full, rtol=1e-5, atol=5e-6)


def test_a_text_encoder_gets_its_part_and_nothing_else(tmp_path: Path) -> None:
    name = "text_model.encoder.layers.0.mlp.fc1"
    weights = {f"{name}.weight": torch.randn(4, 4), "text_model.final_layer_norm.weight": torch.ones(4)}
    factors = {"lora_down.weight": torch.randn(2, 4), "lora_up.weight": torch.randn(4, 2)}
    module = "lora_te1_" + name.replace(".", "_")
    save_file(weights, tmp_path / "clip.safetensors")
    save_file({f"{module}.{part}": tensor for part, tensor in factors.items()}, tmp_path / "lora.safetensors")

    flux_merge_lora.main(
        [
            *("--clip_l", str(tmp_path / "clip.safetensors")),
            *("--clip_l_save_to", str(tmp_path / "out.safetensors")),
            *("--models", str(tmp_path / "lora.safetensors"), "--ratios", "0.5"),
        ]
    )

    merged = load_file(tmp_path / "out.safetensors")
    expected = weights[f"{name}.weight"] + 0.5 * factors["lora_up.weight"] @ factors["lora_down.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], expected)


@pytest.mark.parametrize("quantile", CASE["extract"]["clamp_quantile"])
def test_a_lora_is_extracted_as_recorded(tmp_path: Path, quantile: float) -> None:
    weights = model(tmp_path / "model.safetensors")
    tuned, first = dict(weights), group_by_module(lora("lora-tools-1"))
    paths = {
        "lora_unet_" + name.removesuffix(".weight").replace(".", "_"): name
        for name in weights
        if name.endswith(".weight")
    }
    for module in CASE["extract"]["tuned"]["modules"]:
        delta = read_delta(first[module]).compute_change(CPU)
        assert delta is not None
        noise = draw(f"golden-a/input/flux_lora_tools/noise/{module}", list(delta.shape))
        tuned[paths[module]] = weights[paths[module]] + 0.5 * delta + 0.002 * torch.from_numpy(noise).float()
    save_file(tuned, tmp_path / "tuned.safetensors")

    flux_extract_lora.main(
        [
            *("--model_org", str(tmp_path / "model.safetensors"), "--model_tuned"),
            *(str(tmp_path / "tuned.safetensors"), "--save_to", str(tmp_path / "lora.safetensors")),
            *("--dim", str(CASE["extract"]["dim"]), "--clamp_quantile", str(quantile), "--no_metadata"),
        ]
    )

    made = deltas(tmp_path / "lora.safetensors")
    assert sorted(made) == CASE["extract"]["modules"]
    for name, tensor in TENSORS.items():
        kind, _, module = name.rpartition(".")
        if kind == f"extracted_{quantile}":
            assert float((made[module] - tensor).norm() / tensor.norm()) < 0.05
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.items() >= CASE["extract"]["metadata_without_model_spec"].items()


def test_a_lora_of_flux_2_is_extracted_as_one(tmp_path: Path) -> None:
    state, changed = tiny_state(), "single_blocks.0.linear1.weight"
    tuned = {**state, changed: state[changed] + torch.arange(64.0) / 64}
    paths = [tmp_path / f"{name}.safetensors" for name in ("model", "tuned", "lora")]
    save_file(state, paths[0])
    save_file(tuned, paths[1])
    words = zip(("--model_org", "--model_tuned", "--save_to"), map(str, paths), strict=True)

    flux_extract_lora.main(
        [*(word for pair in words for word in pair), "--dim", "2", "--clamp_quantile", "1"]
    )

    made = read_lora(paths[2])
    assert (made.metadata["ss_base_model_version"], made.family()) == ("flux_2", FLUX_2)
    patch = LoraPatch([WeightedLora(made)])
    torch.testing.assert_close(patch(changed, state[changed]), tuned[changed], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "family"), [(krea2, KREA_2), (z_image, Z_IMAGE)], ids=lambda one: getattr(one, "name", "")
)
def test_a_lora_of_any_transformer_is_extracted_of_all_its_layers(
    tmp_path: Path, model: ModuleType, family: FamilyNames
) -> None:
    """What is extracted and merged again is the tuned model; another kind of file is named."""
    state = model.tiny_state()
    layers = [name for name, one in state.items() if one.ndim == 2 and name.endswith(".weight")]
    tuned = {name: one + 0.1 * one.sum(1, True) if name in layers else one for name, one in state.items()}
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("before", "after", "lora", "merged")}
    save_file(state, paths["before"])
    save_file(tuned, paths["after"])
    words = ["--model_org", paths["before"], "--model_tuned", paths["after"], "--save_to", paths["lora"]]

    extract_lora_from_models.main([str(word) for word in (*words, "--dim", 1, "--clamp_quantile", 1)])
    merge = ["--dit", paths["before"], "--lora_weight", paths["lora"], "--save_merged_model", paths["merged"]]
    merge_lora.main([str(word) for word in merge])

    made = read_lora(paths["lora"])
    assert (made.family(), len(made.modules())) == (family, len(layers))
    for name, one in load_file(paths["merged"]).items():
        torch.testing.assert_close(one, tuned[name], atol=1e-4, rtol=1e-4)
    save_file({"x.weight": torch.ones(2, 2)}, paths["before"])
    with pytest.raises(CheckpointError, match="has no layers with the published names"):
        extract_lora_from_models.main([str(word) for word in words])


def test_the_randomised_decomposition_finds_what_the_whole_one_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(600, 5, generator=generator) @ torch.randn(5, 700, generator=generator)
    change = low + 0.01 * torch.randn(600, 700, generator=generator)

    down, up = decompose_change(change, 4, 1.0, "some.weight")

    u, s, vh = torch.linalg.svd(change)
    best = (u[:, :4] * s[:4]) @ vh[:4]
    assert float((up @ down - best).norm() / best.norm()) < 1e-3
    assert torch.equal(decompose_change(change, 4, 1.0, "some.weight")[0], down)


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (flux_merge_lora.main, ["--save_to", "x.safetensors"], "--models names no LoRA"),
        (
            flux_merge_lora.main,
            ["--models", "{lora}", "--save_to", "x.safetensors"],
            "--ratios has 0 numbers",
        ),
        (flux_merge_lora.main, ["--models", "{lora}", "--ratios", "1"], "--save_to is missing"),
        (convert_flux_lora.main, ["--src", "sd-scripts"], "are both sd-scripts"),
        (convert_flux_lora.main, ["--src_path", "{lora}"], "both needed"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    loras: list[Path], main: Callable[[list[str]], None], arguments: list[str], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        main([argument.replace("{lora}", str(loras[0])) for argument in arguments])


def test_other_networks_than_loras_are_not_merged_into_one(tmp_path: Path, loras: list[Path]) -> None:
    name = "lora_unet_single_blocks_0_linear2"
    full = {f"{name}.diff": torch.ones(*shapes()[name])}
    save_file(full, tmp_path / "whole.safetensors")

    with pytest.raises(CheckpointError, match="Only plain LoRAs can"):
        merge([loras[0], tmp_path / "whole.safetensors"], "--save_to", str(tmp_path / "x.safetensors"))


def test_metadata_of_a_merged_lora_name_its_family_and_sources(tmp_path: Path, loras: list[Path]) -> None:
    merge(loras, "--save_to", str(tmp_path / "sum.safetensors"), "--concat")

    made = read_lora(tmp_path / "sum.safetensors").metadata
    expected = {
        "ss_network_module": "networks.lora_flux",
        "ss_base_model_version": "flux1",
        "ss_network_dim": "7",
        "modelspec.merged_from": "lora-tools-1.safetensors, lora-tools-2.safetensors",
    }
    assert made.items() >= expected.items()
    assert json.loads(made["ss_network_args"]) == {}


def test_parts_of_one_layer_are_joined_by_the_family_of_the_file() -> None:
    tensors = {
        f"lora_unet_transformer_blocks_0_{path}.{part}": torch.ones(2, 2)
        for path in ("ff_net_0_proj", "attn_to_out_0")
        for part in ("lora_down.weight", "lora_up.weight")
    }
    assert "lora_unet_double_blocks_0_img_mlp_0" in group_by_module(join_parts(tensors, family=FLUX))
    assert "lora_unet_double_blocks_0_img_mlp_fc1" in group_by_module(
        join_parts(tensors, family=HUNYUAN_VIDEO)
    )


def test_loras_of_another_model_are_neither_converted_nor_added_up(tmp_path: Path, loras: list[Path]) -> None:
    other, nameless, output = (tmp_path / f"{name}.safetensors" for name in ("other", "nameless", "out"))
    save_file(load_file(loras[0]), other, {"ss_base_model_version": "hunyuan_image"})
    factors = {"lora_down": torch.ones(2, 4 * 8), "lora_up": torch.ones(8, 2)}
    tensors = {f"lora_unet_single_blocks_0_linear2.{part}.weight": one for part, one in factors.items()}
    save_file(tensors, nameless)

    for path, said in (
        (other, "is a LoRA for hunyuan_image according to its metadata, not for flux"),
        (nameless, "is a LoRA for flux_2 according to its sizes, not for flux"),
    ):
        words = ["--src", "sd-scripts", "--dst", "ai-toolkit", "--src_path", str(path)]
        with pytest.raises(CheckpointError, match=said):
            convert_flux_lora.main([*words, "--dst_path", str(output)])
    with pytest.raises(CheckpointError, match="is for hunyuan_image, .* for flux"):
        merge([loras[0], other], "--save_to", str(output))
    assert not output.exists()


@pytest.mark.parametrize(("rank", "share"), [(1, "80.0%"), (2, "100.0%")])
def test_an_extraction_says_how_much_of_the_change_it_keeps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: int, share: str
) -> None:
    """Of singular values 4 and 3 the first is 4/5 of the norm."""
    caplog.set_level("INFO")
    state, changed = tiny_state(), "single_blocks.0.linear1.weight"
    change = torch.zeros_like(state[changed])
    change[0, 5], change[7, 2] = 4, 3
    save_file(state, tmp_path / "a.safetensors")
    save_file({**state, changed: state[changed] + change}, tmp_path / "b.safetensors")
    words = ["--model_org", tmp_path / "a.safetensors", "--model_tuned", tmp_path / "b.safetensors"]
    words += ["--save_to", tmp_path / "lora.safetensors", "--dim", rank, "--clamp_quantile", 1]

    flux_extract_lora.main([str(word) for word in words])

    assert f"kept:       {share} of the change" in caplog.text


def test_the_same_model_twice_gives_no_lora(tmp_path: Path) -> None:
    model(tmp_path / "model.safetensors")
    same, made = str(tmp_path / "model.safetensors"), tmp_path / "lora.safetensors"
    with pytest.raises(CheckpointError, match="there is no change to extract"):
        flux_extract_lora.main(["--model_org", same, "--model_tuned", same, "--save_to", str(made)])
    assert not made.exists()
