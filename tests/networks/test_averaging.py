"""The average of saved files, against closed forms; plain LoRAs of other kinds (--bake)."""

import json
import logging
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
from checkpoints.writing import save_tensors
from modules.errors import CheckpointError, OptionError
from networks import averaging
from networks.apply import LoraPatch
from networks.averaging import LARGEST_SIGMA, AveragingOptions, compute_file_weights, find_gamma
from networks.loading import LoraFile, WeightedLora, read_lora
from networks.lora_format import LoraFormat
from networks.metadata import add_hashes, model_hashes
from networks.module_names import family_named
from networks.names.layouts import COMFYUI, KNOWN
from networks.text_loras import FullPatch
from tests.faults.messages import assert_one_message, run_here
from tests.networks.test_read_by_comfyui import MODELS, write_lora
from tests.networks.test_read_by_comfyui import factors as factors_of_kind
from tests.tiny import hunyuan_dit, stable_diffusion
from tests.tiny.dits import dit_called
from tests.tiny.loras import unused

NAME = "lora_unet_blocks_0_self_attn_q"


def factors(index: int, rank: int = 2, alpha: float = 1.0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(index)
    return {
        f"{NAME}.lora_down.weight": torch.randn(rank, 8, generator=made).bfloat16(),
        f"{NAME}.lora_up.weight": torch.randn(8, rank, generator=made).bfloat16(),
        f"{NAME}.alpha": torch.tensor(alpha),
    }


def write(folder: Path, index: int, step: int | None = None, **sizes: float) -> Path:
    path = folder / f"my lora-{index}.safetensors"
    tensors = factors(index, **sizes)  # type: ignore[arg-type]
    metadata = {"ss_session_id": "7", "ss_output_name": f"run {index}"}
    metadata |= {} if step is None else {"ss_steps": str(step)}
    save_tensors(path, tensors, add_hashes(tensors, metadata))
    return path


def run(folder: Path, *arguments: object) -> dict[str, Tensor]:
    code, said = run_here(
        "lora_post_hoc_ema.py", *arguments, "--output_file", "out.safetensors", folder=folder
    )
    assert code == 0, said
    return load_file(folder / "out.safetensors")


def options(**values: object) -> AveragingOptions:
    known = {"no_sort": False, "beta": 0.95, "beta2": None, "sigma_rel": None, **values}
    made = object.__new__(AveragingOptions)  # files are not looked for
    for name, value in known.items():
        object.__setattr__(made, name, value)
    return made


def test_a_beta_counts_files_as_its_powers() -> None:
    assert compute_file_weights(4, options(beta=0.9)) == pytest.approx([0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1])


@pytest.mark.parametrize("sigma", [0.05, LARGEST_SIGMA])
def test_a_width_gives_the_power_function_with_that_deviation(sigma: float) -> None:
    gamma = find_gamma(sigma)
    # Karras et al. 2023: a density proportional to t^gamma on 0..1
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma)
    count = 500
    weights = torch.tensor(compute_file_weights(count, options(sigma_rel=sigma)), dtype=torch.float64)
    edges = torch.linspace(0, 1, count + 1, dtype=torch.float64) ** (gamma + 1)
    torch.testing.assert_close(weights, edges.diff())  # file k stands for the time from (k - 1) to k


def test_files_are_averaged_by_their_step_in_more_than_their_own_precision(tmp_path: Path) -> None:
    for index, step in ((1, 300), (2, 100), (3, 200)):
        write(tmp_path, index, step)

    found = run(tmp_path, tmp_path / "my lora-*.safetensors", "--beta", 0.5)

    first, second, last = factors(2), factors(3), factors(1)
    for name, tensor in found.items():
        exact = 0.25 * first[name].double() + 0.25 * second[name].double() + 0.5 * last[name].double()
        assert torch.equal(tensor, exact.to(last[name].dtype))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_output_name"] == "run 1"
    assert metadata["sshs_model_hash"] == model_hashes(found, metadata)["sshs_model_hash"]
    assert json.loads(metadata["ss_post_hoc_ema"]) == {
        "beta": 0.5,
        "beta2": None,
        "files": {"my lora-2.safetensors": 0.25, "my lora-3.safetensors": 0.25, "my lora-1.safetensors": 0.5},
    }
    assert read_lora(tmp_path / "out.safetensors").metadata == metadata


@pytest.mark.parametrize(("switch", "last"), [([], 1), (["--no_sort"], 2)])
def test_without_steps_time_decides_or_the_order_given(tmp_path: Path, switch: list[str], last: int) -> None:
    paths = [write(tmp_path, index) for index in (1, 2)]
    os.utime(paths[1], (1, 1))

    found = run(tmp_path, *paths, "--beta", 0, *switch)

    assert all(torch.equal(found[name], tensor) for name, tensor in factors(last).items())


def test_copies_and_averages_are_left_out(tmp_path: Path) -> None:
    paths = [write(tmp_path, index, index) for index in (1, 2)]
    tensors = factors(2)
    copy, average = tmp_path / "copy.safetensors", tmp_path / "x-ema.safetensors"
    save_tensors(copy, tensors, add_hashes(tensors, {"ss_steps": "2"}))
    save_tensors(average, factors(3), add_hashes(factors(3), {"ss_steps": "2", "ss_ema_decay": "0.9"}))

    found = run(tmp_path, *paths, copy, average, "--beta", 0.5)

    expected = run(tmp_path, *paths, "--beta", 0.5)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_file_larger_than_a_lora_is_written_tensor_by_tensor_without_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path, index, index) for index in (1, 2)]
    expected = run(tmp_path, *paths)
    monkeypatch.setattr(averaging, "LARGEST_HASHED", 0)

    given = options(path=tuple(paths), output_file=tmp_path / "large.safetensors")
    averaging.average_files(given)

    found = load_file(tmp_path / "large.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with safe_open(tmp_path / "large.safetensors", "pt") as file:
        assert not [key for key in file.metadata() if key.startswith("sshs")]


@pytest.mark.parametrize(
    ("sizes", "arguments", "words"),
    [
        ({"rank": 3}, (), ("contains a different network", "equal ranks")),
        ({"alpha": 2.0}, (), ("alpha differs", "equal alphas")),
        ({}, ("--output_file", "out.pth"), ("--output_file", ".safetensors")),
    ],
)
def test_what_cannot_be_averaged_is_refused(
    tmp_path: Path, sizes: dict[str, float], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    paths = [write(tmp_path, 1, 1), write(tmp_path, 2, 2, **sizes)]
    output = () if "--output_file" in arguments else ("--output_file", "out.safetensors")

    code, said = run_here("lora_post_hoc_ema.py", *paths, *arguments, *output, folder=tmp_path)

    assert_one_message(code, said, *words)
    assert not (tmp_path / "out.safetensors").exists()


def test_files_of_two_formats_are_averaged_after_the_command_of_the_message(tmp_path: Path) -> None:
    """As of a run that was resumed with another --lora_format."""
    tiny = dit_called("ltx_2 2.3")
    _, network = tiny.with_lora(2)
    paths = [tmp_path / f"{name}.safetensors" for name in (KNOWN, COMFYUI)]
    for path in paths:
        metadata = {"ss_base_model_version": "ltx2", "ss_steps": str(len(path.stem))}
        LoraFormat(path.stem, family_named("ltx_2")).save(network, path, None, metadata)
        for parameter in network.parameters():  # the next file is of another step
            parameter.data += 1
    code, said = run_here("lora_post_hoc_ema.py", *paths, "--output_file", "x.safetensors", folder=tmp_path)
    assert code == 1
    command = said.partition("Convert it: python convert_lora.py ")[2].splitlines()[0]

    assert run_here("convert_lora.py", *shlex.split(command), folder=tmp_path)[0] == 0

    averaged = run(tmp_path, paths[0], tmp_path / "comfyui_known.safetensors")
    assert averaged.keys() == load_file(paths[0]).keys()


def test_files_of_a_cache_are_no_networks(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"latents_1x8x8_bfloat16": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    words = ("a.safetensors", "b.safetensors", "--output_file", "out.safetensors")
    assert_one_message(
        *run_here("lora_post_hoc_ema.py", *words, folder=tmp_path), "does not contain a network", "Pass"
    )


@pytest.mark.parametrize("given", [["one", "one"], ["none*"], ["one", "none"]])
def test_less_than_two_files_are_refused(tmp_path: Path, given: list[str]) -> None:
    write(tmp_path, 1).rename(tmp_path / "one")

    code, said = run_here("lora_post_hoc_ema.py", *given, "--output_file", "out", folder=tmp_path)

    assert_one_message(code, said)


def test_a_file_that_holds_nan_is_refused(tmp_path: Path) -> None:
    tensors = factors(2)
    tensors[f"{NAME}.lora_up.weight"][0, 0] = torch.nan
    save_tensors(tmp_path / "bad.safetensors", tensors, {})

    code, said = run_here(
        *("lora_post_hoc_ema.py", write(tmp_path, 1), "bad.safetensors", "--output_file", "out"),
        folder=tmp_path,
    )

    assert_one_message(code, said, "bad.safetensors")


def write_for(folder: Path, index: int, expert: str | None, name: str = "") -> Path:
    path, tensors = folder / f"x-{index}{name}.safetensors", factors(index)
    metadata = {"ss_session_id": "7"} | ({} if expert is None else {"ss_wan_expert": expert})
    save_tensors(path, tensors, add_hashes(tensors, metadata))
    return path


def test_an_average_is_for_the_expert_of_its_files(tmp_path: Path) -> None:
    run(tmp_path, *(write_for(tmp_path, index, "high") for index in range(3)))

    assert read_lora(tmp_path / "out.safetensors").expert == "high_noise"


@pytest.mark.parametrize("second", [("low", ""), ("both", ""), (None, "_low_noise")])
def test_files_for_different_experts_are_refused(tmp_path: Path, second: tuple[str | None, str]) -> None:
    files = [write_for(tmp_path, 0, "high"), write_for(tmp_path, 1, *second)]

    code, said = run_here("lora_post_hoc_ema.py", *files, "--output_file", "out.safetensors", folder=tmp_path)

    assert_one_message(code, said, "The files are LoRAs of different experts")


STATES = {name: MODELS[name].state for name in ("wan", "hunyuan_video", "flux")}
PLAIN = {"lora_down.weight", "lora_up.weight", "alpha"}


def bake(folder: Path, rank: int, *more: str, target: str = "default") -> LoraFile:
    words = ["--input", str(folder / "saved.safetensors"), "--output", str(folder / "plain.safetensors")]
    convert_lora.main([*words, "--target", target, "--bake", str(rank), "--device", "cpu", *more])
    return read_lora(folder / "plain.safetensors", with_texts=True)


def effect(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    patch = LoraPatch([WeightedLora(read_lora(path))])
    found = {name: patch(name, one.float()) - one.float() for name, one in state.items()}
    assert unused(patch) == []
    return found


def assert_same_effect(state: Mapping[str, Tensor], folder: Path, atol: float = 2e-5) -> None:
    expected = effect(state, folder / "saved.safetensors")
    for name, found in effect(state, folder / "plain.safetensors").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=atol)


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("wan", "LoHa", "other"),
        ("flux", "LoKr", "diffusers"),
        ("hunyuan_video", "DoRA", "default"),
        ("flux", "DoRA", "other"),
    ],
)
def test_a_plain_lora_of_enough_rank_does_the_same(tmp_path: Path, name: str, kind: str, target: str) -> None:
    state = STATES[name]
    write_lora(tmp_path / "saved.safetensors", kind, state, name, "0.")
    save_file(dict(state), tmp_path / "dit.safetensors")
    dit = ["--dit", str(tmp_path / "dit.safetensors")] if kind == "DoRA" else []

    found = bake(tmp_path, 5000 if kind == "DoRA" else 4, *dit, target=target)  # 2 of a LoHa are at most 4

    assert all(factors_of_kind.keys() <= PLAIN for factors_of_kind in found.modules().values())
    assert found.metadata["ss_network_module"] == "networks.lora"
    assert_same_effect(state, tmp_path)


def test_the_share_that_is_lost_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    state = STATES["wan"]
    write_lora(tmp_path / "saved.safetensors", "DoRA", state, "wan", "0.")
    save_file(dict(state), tmp_path / "dit.safetensors")

    found = bake(tmp_path, 8, "--dit", str(tmp_path / "dit.safetensors"))

    wanted, got = (effect(state, tmp_path / f"{name}.safetensors") for name in ("saved", "plain"))
    lost = {name: float((got[name] - one).norm()) for name, one in wanted.items() if one.any()}
    sizes = {name: float(wanted[name].norm()) for name in lost}
    share = sum(one**2 for one in lost.values()) ** 0.5 / sum(one**2 for one in sizes.values()) ** 0.5
    worst = max(lost, key=lambda name: lost[name] / sizes[name])
    told = re.search(r"at rank 8: (\S+) % of the change\s+is\s+lost, at most (\S+) % \((\w+)\)", caplog.text)
    assert told is not None
    assert float(told[1]) == pytest.approx(100 * share, rel=0.06)
    assert float(told[2]) == pytest.approx(100 * lost[worst] / sizes[worst], rel=0.06)
    assert told[3] == f"lora_unet_{worst.removesuffix('.weight').replace('.', '_')}"
    assert {len(factors_of_kind["lora_down.weight"]) for factors_of_kind in found.modules().values()} == {8}


@pytest.mark.parametrize("dialect", ["comfy_all_in_one", "diffusers", "comfy_fp8_scaled"])
def test_a_dora_is_baked_from_a_model_in_any_layout(tmp_path: Path, dialect: str) -> None:
    state = STATES["hunyuan_video"]
    write_lora(tmp_path / "saved.safetensors", "DoRA", state, "hunyuan_video", "0.")
    dit = hunyuan_dit.write_dit(tmp_path, state, dialect)

    bake(tmp_path, 5000, "--dit", str(dit))

    assert_same_effect(state, tmp_path, atol=0.05 if "fp8" in dialect else 2e-5)


def test_a_dora_is_baked_from_a_model_that_swaps_the_halves_of_a_layer_in_each_block(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {"blocks.0.mlp.fc1.weight": torch.randn(16, 8, generator=generator)}
    write_lora(tmp_path / "saved.safetensors", "DoRA", state, "minimax_h3", "0.")
    swapped = state["blocks.0.mlp.fc1.weight"].roll(8, 0)
    save_file({"transformer_blocks.0.ff.net.0.proj.weight": swapped}, tmp_path / "dit.safetensors")

    bake(tmp_path, 5000, "--dit", str(tmp_path / "dit.safetensors"))

    assert_same_effect(state, tmp_path)


def test_a_dora_of_text_encoders_in_one_file_with_the_model(tmp_path: Path) -> None:
    model = stable_diffusion.write_sdxl(tmp_path)
    state = {name: one.float() for name, one in load_file(model).items()}
    generator = torch.Generator().manual_seed(0)
    layer, block = "text_model.encoder.layers.0.mlp.fc1", "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    weights = {
        f"lora_te1.{layer}": f"conditioner.embedders.0.transformer.{layer}.weight",
        f"lora_te2.{layer}": "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight",
        f"lora_unet.{block}": f"model.diffusion_model.{block}.weight",
    }
    tensors = {
        f"{module.replace('.', '_')}.{part}": tensor
        for module, name in weights.items()
        for part, tensor in factors_of_kind("DoRA", state[name], generator).items()
    }
    save_file(tensors, tmp_path / "saved.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})

    bake(tmp_path, 5000, "--dit", str(model))

    expected, found = (
        {
            name: patch.add_to(name, one.clone()) - one
            for name, one in state.items()
            if patch.changes_parameter(name)
        }
        for file in ("saved", "plain")
        for lora in [read_lora(tmp_path / f"{file}.safetensors", with_texts=True)]
        for patch in [FullPatch([WeightedLora(lora)], state, model)]
    )
    assert len(expected) == len(found) == 3
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("DoRA", [], "Add --dit"),
        ("LoRA", [], "only plain LoRAs"),
        ("DoRA", ["--dit", "flux.safetensors"], "is not in the files of --dit"),
        ("LoHa", ["--dit", "missing.safetensors"], "no such file"),
    ],
)
def test_what_cannot_be_baked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(dict(STATES["flux"]), "flux.safetensors")
    write_lora(tmp_path / "saved.safetensors", kind, STATES["wan"], "wan", "0.")

    with pytest.raises((OptionError, CheckpointError), match=message):
        bake(tmp_path, 4, *more)
    assert not Path("plain.safetensors").exists()
