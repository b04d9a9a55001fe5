"""--lora_format through the scripts that users type, for every family: train, save, resume, use."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.faults.messages import assert_one_message, run_here
from tests.tiny.families import FAMILIES, TinyFamily, family_called
from tests.tiny.runs import Latents, TinyProject, make_project

STARTS = {"known": "lora_unet_", "diffusers": "transformer."}
DAILY = {"wan t2v-1.3B", "ltx_2 with sound"}
# their networks and names are those of the others
ALIKE = {"wan flf2v-14B", "wan t2v-1.3B-FC", "wan i2v-14B-FC", "framepack f1", "framepack one frame", "ltx_2"}
CASES = [
    pytest.param(one, id=one.name, marks=() if one.name in DAILY else pytest.mark.slow)
    for one in FAMILIES
    if one.name not in ALIKE
]
TWO_STEPS = ("--max_train_steps", "2", "--save_state", "--save_every_n_steps", "1")


@pytest.fixture(scope="module", params=CASES)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    family: TinyFamily = request.param
    return make_project(family, tmp_path_factory.mktemp("formats"))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def pictures(project: TinyProject, name: str, lora: str) -> list[Latents]:
    return project.generate(name, "--prompt", "a cat", "--seed", "1", "--lora_weight", lora)


@pytest.mark.slow_cases("ltx_2 with sound")
def test_every_format_is_the_same_lora_in_all_that_follows(project: TinyProject) -> None:
    """To the bit, as alpha / rank is 1/4."""
    known = project.train("known", "--lora_format", "known", *TWO_STEPS, "--ema_decay", "0.5")
    expected = pictures(project, "of known", "known/x.safetensors")
    from_known = project.train("from known", "--network_weights", "known/x.safetensors", *TWO_STEPS[:2])
    is_framepack = project.family.name.startswith("framepack")
    assert all(name.startswith(STARTS["known"]) for name in known)

    for name in ("diffusers",) if is_framepack else ("comfyui", "diffusers"):
        words = ("--lora_format", name, *TWO_STEPS, "--ema_decay", "0.5")
        tensors = project.train(name, *words)
        folder = project.folder / name
        for path in folder.glob("*.safetensors"):  # of each step, of the end, and averages
            assert metadata_of(path)["ss_lora_format"] == name
            assert load_file(path).keys() == tensors.keys()
        assert tensors.keys() != known.keys() or name == "comfyui"
        if name in STARTS:
            assert all(key.startswith(STARTS[name]) for key in tensors)
        for found, one in zip(
            pictures(project, f"of {name}", f"{name}/x.safetensors"), expected, strict=True
        ):
            assert_equal(found, one)
        state = f"{name}/x-step00000001-state"
        assert_equal(project.train(f"resumed {name}", *words, "--resume", state), tensors)
        starting = ("--network_weights", f"{name}/x.safetensors", *TWO_STEPS[:2])
        assert_equal(project.train(f"from {name}", *starting), from_known)


def test_without_the_option_files_are_as_before_but_for_ltx_2(project: TinyProject) -> None:
    tensors = project.train("usual", *TWO_STEPS[:2])

    is_comfyui = project.family.name.startswith(("hidream_o1", "ltx_2"))
    assert all(name.startswith("diffusion_model." if is_comfyui else "lora_unet_") for name in tensors)
    expected = "comfyui" if is_comfyui else "known"
    assert metadata_of(project.folder / "usual" / "x.safetensors")["ss_lora_format"] == expected


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    return make_project(family_called("wan t2v-1.3B"), tmp_path_factory.mktemp("wan"))


def test_files_of_both_experts_have_the_format(wan: TinyProject) -> None:
    experts = ("--task", "t2v-A14B", "--dit_high_noise", "model/dit.safetensors", "--lora_per_expert")
    for name in ("known", "comfyui", "diffusers"):
        words = (*wan.family.train, "--output_dir", f"two {name}", "--output_name", "x", "--seed", "1")
        wan.run(*words, *experts, "--lora_format", name, "--max_train_steps", "2")
    for expert in ("low_noise", "high_noise"):
        files = {
            name: wan.folder / f"two {name}" / f"x_{expert}.safetensors" for name in ("comfyui", "diffusers")
        }
        assert all(key.startswith("diffusion_model.") for key in load_file(files["comfyui"]))
        assert all(key.startswith("transformer.") for key in load_file(files["diffusers"]))
        back = wan.folder / "back.safetensors"
        for path in files.values():
            wan.run("convert_lora.py", "--input", path, "--output", back, "--target", "default")
            assert_equal(load_file(back), load_file(wan.folder / "two known" / path.name))


def test_tools_take_any_format(wan: TinyProject) -> None:
    """Merged into a model or a base, averaged after the run, extracted again."""
    results: dict[str, list[dict[str, Tensor]]] = {}
    for name in ("known", "comfyui", "diffusers"):
        wan.train(f"tools {name}", "--lora_format", name, *TWO_STEPS)
        lora, saved = f"tools {name}/x.safetensors", wan.folder / f"merged {name}.safetensors"
        model = ("--dit", "model/dit.safetensors", "--lora_weight", lora)
        wan.run("merge_lora.py", *model, "--save_merged_model", saved)
        steps = (f"tools {name}/x-step00000001.safetensors", f"tools {name}/x-step00000002.safetensors")
        average = wan.folder / f"average {name}.safetensors"
        wan.run("lora_post_hoc_ema.py", *steps, "--output_file", average, "--beta", "0.5")
        assert metadata_of(average)["ss_lora_format"] == name
        wan.run("convert_lora.py", "--input", average, "--output", "back.safetensors", "--target", "default")
        base = wan.train(f"on {name}", "--base_weights", lora, "--lora_format", "known", *TWO_STEPS[:2])
        results[name] = [load_file(saved), load_file(wan.folder / "back.safetensors"), base]

    for name in ("comfyui", "diffusers"):
        for found, expected in zip(results[name], results["known"], strict=True):
            assert_equal(found, expected)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--lora_format", "diffusers", "--network_module", "networks.loha"), "diffusers cannot read a LoHa"),
        (("--lora_format", "diffusers", "--network_module", "networks.lokr"), "diffusers cannot read a LoKr"),
        (("--lora_format", "comfyui", "--network_args", "dora_wd=True"), "divides the magnitudes of a DoRA"),
        (("--lora_format", "comfyui", "--network_module", "lycoris.kohya"), "that package's own names"),
    ],
)
def test_a_network_that_a_format_cannot_hold_is_refused_before_anything_is_loaded(
    wan: TinyProject, words: tuple[str, ...], reason: str
) -> None:
    outputs = ("--output_dir", "refused", "--output_name", "x")
    script, *options = [*wan.family.train, *outputs, "--max_train_steps", "1", *words]

    code, said = run_here(script, *options, folder=wan.folder)

    assert_one_message(code, said, f"--lora_format {words[1]}: ", reason)
    assert not (wan.folder / "refused").exists()
    assert "tensors loaded" not in said
