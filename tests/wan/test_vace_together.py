"""VACE with what else a command can ask for: each is equal to plain, or refused with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.errors import OptionError
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.parity.running import assert_equal, generate, models_in
from tests.parity.test_vace import ASK, Options, Scene
from wan.options import WanExpertOptions, WanTrainingOptions

FACTORS = ["vace_blocks.1.self_attn.q", "vace_blocks.0.ffn.2"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("vace"))


@pytest.fixture(scope="module")
def apart(scene: Scene) -> Path:
    """The folder of the models again, the second stacks in files of their own: `vace`, `vace_high`."""
    folder = scene.folder / "apart"
    folder.mkdir()
    for path in scene.models.glob("*.safetensors"):
        state = load_file(path)
        side = {name: tensor for name, tensor in state.items() if name.startswith("vace_")}
        if side:
            save_file(side, folder / path.name.replace("dit", "vace"))
        save_file({name: tensor for name, tensor in state.items() if name not in side}, folder / path.name)
    (folder / "google").symlink_to(scene.models / "google", target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def lora(scene: Scene) -> Path:
    """A LoRA of the second stack alone."""
    state, random = load_file(scene.models / "dit.safetensors"), torch.Generator().manual_seed(5)
    made: dict[str, Tensor] = {}
    for path in FACTORS:
        rows, columns = state[f"{path}.weight"].shape
        name = f"lora_unet_{path.replace('.', '_')}"
        made[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=random) / 10
        made[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=random) / 10
        made[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(made, scene.folder / "lora.safetensors")
    return scene.folder / "lora.safetensors"


@pytest.fixture(scope="module")
def plain(scene: Scene) -> Tensor:
    return made_by(scene)


def made_by(scene: Scene, *options: object, folder: str = "made") -> Tensor:
    return generate(scene.folder / folder, scene.models, "vace-1.3B", *ASK, *given(scene), *options)


def given(scene: Scene) -> Options:
    return [*scene.video, *scene.mask, *scene.pictures]


def test_a_lora_of_the_second_stack_fits_the_file_that_has_it(
    scene: Scene, apart: Path, lora: Path, plain: Tensor
) -> None:
    with_lora = ["--lora_weight", lora]
    full = made_by(scene, *with_lora, folder="whole")
    beside = ["--vace", apart / "vace.safetensors"]

    latents = generate(scene.folder / "beside", apart, "vace-1.3B", *ASK, *given(scene), *with_lora, *beside)

    assert torch.equal(latents, full)
    assert not torch.equal(latents, plain)


def test_files_that_stand_beside_each_other_are_merged_one_by_one(
    scene: Scene, apart: Path, lora: Path
) -> None:
    merge = ["--lora_weight", lora, "--save_merged_model", "merged.safetensors", "--device", "cpu"]
    beside = [*models_in(apart), "--vace", apart / "vace.safetensors", "--task", "vace-1.3B"]

    code, message = run_here(
        "wan_generate_video.py", *beside, *merge, "--save_path", "made", folder=scene.folder
    )
    assert_one_message(code, message, "vace.safetensors", "merge_lora.py")
    succeed_here("merge_lora.py", "--dit", apart / "vace.safetensors", *merge, folder=scene.folder)

    full = made_by(scene, "--lora_weight", lora, folder="lora")
    merged = ["--vace", scene.folder / "merged.safetensors"]
    latents = generate(scene.folder / "merged", apart, "vace-1.3B", *ASK, *given(scene), *merged)
    assert_equal(latents, full, "merged", 1e-6)  # W + BA is rounded to float32 once more


@pytest.mark.parametrize(
    ("asked", "tolerance"),
    [
        (["--blocks_to_swap", 3], 0.0),
        (["--fp8_scaled"], 0.05),  # roundings of 1/16
        (["--convrot_int8"], 0.05),
    ],
    ids=lambda asked: asked[0] if isinstance(asked, list) else "",
)
def test_savers_of_memory_and_time_make_the_plain_clip(
    scene: Scene, plain: Tensor, asked: list[object], tolerance: float
) -> None:
    latents = made_by(scene, *asked, folder=str(asked[0]))

    assert_equal(latents, plain, str(asked[0]), tolerance)
    assert torch.equal(latents, plain) is (tolerance == 0)


def test_a_table_with_references_hints_at_vace(scene: Scene) -> None:
    table = '[[datasets]]\nvideo_directory = "v"\ncache_directory = "c"\nresolution = [48, 32]\n'
    for key in ("reference_directory", "control_mask_directory"):
        text = f'{table}control_directory = "v"\n{key} = "v"\n'
        (scene.folder / "hint.toml").write_text(text, encoding="utf-8")
        told = ["--dataset_config", "hint.toml", "--vae", scene.models / "vae.safetensors"]
        code, message = run_here("wan_cache_latents.py", *told, folder=scene.folder)
        assert_one_message(code, message, key, "cache with --vace")


def test_two_transformers_have_blocks_of_vace_each() -> None:
    low, high = Path("low"), Path("high")
    said: dict[str, Any] = {"task": "vace-A14B", "dit": low, "vace": low}
    WanTrainingOptions(**said, sample_dit_other=high, vace_high_noise=high)
    for more, missing in (
        ({"sample_dit_other": high}, "Pass --vace_high_noise"),
        ({"experts": WanExpertOptions(dit_high_noise=high)}, "Pass --vace_high_noise"),
        ({"vace_high_noise": high}, "Pass --dit_high_noise"),
    ):
        with pytest.raises(OptionError, match=missing):
            WanTrainingOptions(**said, **more)
