"""What FLUX 3 refuses and why; samples of a training that are made with the distilled model."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import flux_3_train_network
from flux_2.family import Flux2
from flux_2.files import Flux2Files
from flux_3.family import Flux3
from flux_3.files import Flux3Files
from modules.errors import CacheError, OptionError
from protocols.data import Batch
from protocols.requests import Request
from protocols.steps import Overrides, StepPosition
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny import flux_2
from tests.tiny.families import OUTPUT, family_called
from tests.tiny.flux_3 import CONFIG, tiny_state, write_dit, write_tiny_flux_3
from tests.tiny.hunyuan_encoders import save
from tests.tiny.project import write_image
from tests.tiny.runs import make_project


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, and beside it the distilled transformer and one of FLUX.2."""
    folder = tmp_path_factory.mktemp("flux 3")
    write_tiny_flux_3(folder / "model")
    write_dit(folder / "model", tiny_state(seed=5, is_flow_map=True), name="distilled")
    flux_2.write_dit(folder / "model", flux_2.tiny_state(), name="flux2")
    return folder


def family_of(folder: Path, name: str = "dit", **settings: bool) -> Flux3:
    files = Flux3Files(
        dit=folder / "model" / f"{name}.safetensors",
        vae=folder / "model" / "vae.safetensors",
        text_encoder=folder / "model" / "text_encoder",
        **settings,  # type: ignore[arg-type]
    )
    return Flux3(files)


def test_the_tensors_tell_base_from_distilled(folder: Path) -> None:
    base, distilled = family_of(folder), family_of(folder, "distilled")

    assert (base.defaults.steps, base.defaults.guidance_scale) == (50, 3.5)
    assert (distilled.defaults.steps, distilled.defaults.guidance_scale) == (16, 1.0)
    assert base.defaults.flow_shift == distilled.defaults.flow_shift == 6.93
    assert base.few_steps_evidence() is None
    assert "the time that a step jumps to" in str(distilled.few_steps_evidence())


def test_sizes_follow_the_first_reference_unless_they_are_asked_for(folder: Path) -> None:
    family = family_of(folder)
    for name, size in {"a": (75, 61), "b": (131, 75), "whole": (64, 48)}.items():
        write_image(folder / f"{name}.png", *size)

    def prepared(*names: str, **asked: int) -> tuple[int, int, object]:
        images = tuple(folder / f"{name}.png" for name in names)
        made = family.prepare(Request("a cat", seed=1, control_images=images, **asked))
        return made.width, made.height, made.visible_region and tuple(made.visible_region)

    assert prepared() == (1024, 1024, None)
    assert prepared("a") == (80, 64, (2, 1, 75, 61))
    assert prepared("whole") == (64, 64, (0, 8, 64, 48))
    assert prepared("b", "a") == (128, 64, None)
    assert prepared("a", width=48, height=32) == (48, 32, None)
    assert prepared("a", width=48) == (48, 64, None)


def test_the_distilled_model_takes_neither_guidance_nor_another_solver(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = family_of(folder, "distilled")

    assert family.prepare(Request("a cat", seed=1, guidance_scale=3.5)).guidance_scale == (1.0,)
    assert "guidance scale 3.5 is ignored" in caplog.text
    with pytest.raises(OptionError, match="mean velocity of each step"):
        family.prepare(Request("a cat", seed=1, solver="unipc"))


def test_latents_are_those_of_flux_2_too(folder: Path) -> None:
    ours = family_of(folder).same_latents
    theirs = Flux2(Flux2Files(model_version="dev")).same_latents

    assert ours == theirs
    assert ours >= {"flux_3", "flux_2_dev", "flux_2_klein_4b"}


def test_at_most_ten_references(folder: Path) -> None:
    write_image(folder / "a.png", 75, 61)
    with pytest.raises(OptionError, match="11 reference images, but FLUX 3 takes 10 at most"):
        family_of(folder).prepare(Request("a cat", seed=1, control_images=(folder / "a.png",) * 11))


GENERATE = (
    "flux_3_generate_image.py",
    "--vae",
    "model/vae.safetensors",
    "--text_encoder",
    "model/text_encoder",
)
MADE = ("--prompt", "a cat", "--image_size", "32", "32", "--save_path", "made")


def test_files_of_other_models_are_refused_by_name(folder: Path) -> None:
    code, said = run_here(*GENERATE, "--dit", "model/flux2.safetensors", *MADE, folder=folder)
    assert_one_message(code, said, "is not a FLUX 3 transformer", "a FLUX.2 transformer")
    words = ("flux_2_generate_image.py", *GENERATE[1:], "--dit", "model/dit.safetensors")
    code, said = run_here(*words, "--model_version", "klein-base-4b", *MADE, folder=folder)
    assert_one_message(code, said, "is not a FLUX.2 transformer", "a FLUX 3 transformer")
    code, said = run_here(
        *GENERATE, "--dit", "model/dit.safetensors", "--model_version", "dev", *MADE, folder=folder
    )
    assert code == 2 or "not needed" in said


def test_a_lora_of_flux_2_is_refused_by_name(folder: Path) -> None:
    factors = {"lora_down.weight": torch.zeros(2, 64), "lora_up.weight": torch.zeros(576, 2)}
    module = "lora_unet_single_blocks_0_linear1"
    save_file({f"{module}.{name}": one for name, one in factors.items()}, folder / "flux2_lora.safetensors")

    words = ("--dit", "model/dit.safetensors", "--lora_weight", "flux2_lora.safetensors")
    code, said = run_here(*GENERATE, *words, *MADE, folder=folder)

    assert code == 1
    assert "flux2_lora.safetensors" in said
    assert "FLUX.2" in said or "flux_2" in said


def test_an_encoder_of_another_width_is_refused(folder: Path, tmp_path: Path) -> None:
    """As Qwen3-VL-8B in place of 4B."""
    wide = tiny_state()
    wide["txt_in.weight"] = torch.zeros(64, 8 * 96)
    dit = write_dit(tmp_path, wide, name="wide")

    code, said = run_here(*GENERATE, "--dit", dit, *MADE, folder=folder)

    assert_one_message(code, said, "--text_encoder", "512", "768")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of pictures with caches."""
    folder = tmp_path_factory.mktemp("train")
    make_project(family_called("flux_3"), folder)
    write_dit(folder / "model", tiny_state(seed=5, is_flow_map=True), name="distilled")
    (folder / "prompts.txt").write_text("a cat --w 32 --h 32 --d 7 --ci start.png", encoding="utf-8")
    return folder


WORDS = (*family_called("flux_3").train, *OUTPUT)
PROMPTS = ("--sample_prompts", "prompts.txt", "--sample_every_n_steps", "2")
DISTILLED = ("--distilled_dit", "model/distilled.safetensors")


@pytest.mark.slow
def test_samples_are_what_the_distilled_model_makes_with_the_lora(trained: Path) -> None:
    words = (*WORDS, "--max_train_steps", "2", "--overwrite")
    succeed_here(*words, *DISTILLED, *PROMPTS, folder=trained)
    lora = load_file(trained / "output" / "lora.safetensors")
    (sample,) = (trained / "output" / "sample").glob("*_7.png")
    there = numpy.asarray(Image.open(sample), dtype=int)
    succeed_here(*words, folder=trained)
    alone = load_file(trained / "output" / "lora.safetensors")

    assert all(torch.equal(lora[name], alone[name]) for name in alone)
    models = [*GENERATE, "--dit", "model/distilled.safetensors", "--control_image_path", "start.png"]
    models += ["--vae_dtype", "float32", "--text_encoder_dtype", "float32"]
    made = ("--prompt", "a cat", "--image_size", "32", "32", "--seed", "7", "--save_path", "made")
    succeed_here(*models, *made, "--lora_weight", "output/lora.safetensors", folder=trained)
    (image,) = (trained / "made").glob("*.png")
    assert abs(numpy.asarray(Image.open(image), dtype=int) - there).max() <= 1


def test_base_and_distilled_have_their_own_options(trained: Path) -> None:
    words = (*WORDS, "--max_train_steps", "1")

    code, said = run_here(*words, "--dit", "model/distilled.safetensors", folder=trained)
    assert_one_message(code, said, "--dit", "cannot be trained", "--distilled_dit")
    base = trained / "model" / "other.safetensors"
    write_dit(base.parent, tiny_state(seed=3), name="other")
    code, said = run_here(*words, "--distilled_dit", base, folder=trained)
    assert_one_message(code, said, "--distilled_dit", "the base FLUX 3 Klein transformer")
    code, said = run_here(*words, "--distilled_dit", "model/dit.safetensors", folder=trained)
    assert_one_message(code, said, "--distilled_dit", "this is what --dit trains")


@pytest.mark.slow
def test_a_plan_counts_both_transformers(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    words = (*WORDS[1:], "--max_train_steps", "1", "--overwrite", *DISTILLED)
    for more, is_loaded in ((PROMPTS, True), ((), False)):
        capsys.readouterr()
        flux_3_train_network.main([*words, *more, "--plan"])
        rows = re.findall("further transformers.*they take turns on the device", capsys.readouterr().out)
        assert len(rows) == is_loaded


def test_states_of_another_encoder_or_without_padding_are_refused(folder: Path) -> None:
    family, latents = family_of(folder), torch.zeros(1, 128, 1, 3, 3)

    def conditions(tokens: int, width: int = CONFIG.text_dim) -> Any:
        tensors: dict[str, Any] = {"latents": latents, "ctx_vec": [torch.zeros(tokens, width)]}
        return family.batch_conditions(latents, Batch(tensors, ("a cat",), ("a.png",)))

    assert conditions(160)["ctx_vec"][0].shape == (160, CONFIG.text_dim)
    again = "flux_3_cache_text_encoder_outputs.py"
    for tokens in (33, 40, 120):
        with pytest.raises(CacheError, match=f"{tokens} tokens, not a multiple of 80.*{again}"):
            conditions(tokens)
    with pytest.raises(CacheError, match=f"has width 8.*{again}"):
        conditions(80, width=8)


@pytest.mark.parametrize("is_distilled", [False, True])
def test_the_distilled_model_is_told_when_its_step_ends(folder: Path, is_distilled: bool) -> None:
    seen: dict[str, Any] = {}

    class Noting(torch.nn.Module):
        config = SimpleNamespace(is_flow_map=is_distilled)

        def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, **inputs: Any) -> torch.Tensor:
            seen.update(inputs, timesteps=timesteps)
            return noisy

    turn = StepPosition(step=1, num_steps=4, timestep=750.0, next_timestep=500.0, pass_key="positive")
    texts = {"ctx_vec": [torch.zeros(80, CONFIG.text_dim)] * 2}
    noisy = torch.zeros(2, 128, 1, 3, 3)
    family_of(folder).predict(
        Noting(), noisy, torch.tensor([750.0, 750.0]), texts, Overrides(step_position=turn)
    )

    assert seen["timesteps"].tolist() == [750.0, 750.0]
    ends = seen["next_timesteps"]
    assert ends is None if not is_distilled else ends.tolist() == [500.0, 500.0]


@pytest.mark.slow
def test_without_references_the_layers_for_them_learn_nothing(tmp_path: Path) -> None:
    family = family_called("flux_3")
    make_project(family, tmp_path)
    dataset = tmp_path / "dataset.toml"
    text = dataset.read_text(encoding="utf-8")
    dataset.write_text(re.sub("control_directory.*\n", "", text), encoding="utf-8")
    succeed_here(*family.cache_latents, folder=tmp_path)

    succeed_here(*WORDS, "--max_train_steps", "2", folder=tmp_path)

    lora = load_file(tmp_path / "output" / "lora.safetensors")
    of_references = [name for name in lora if "image_cond" in name and "up" in name]
    assert of_references
    assert not any(lora[name].any() for name in of_references)
    assert all(lora[name].any() for name in lora if "image_cond" not in name)


@pytest.mark.slow
def test_layers_of_pre_training_and_diffusers_releases_are_read(folder: Path, tmp_path: Path) -> None:
    """Left-over `repa_projectors.*`; the folder of a release, with `transformer` and `vae` in it."""
    state = tiny_state()
    save(tmp_path / "repa.safetensors", {**state, "repa_projectors.0.weight": torch.zeros(4, 4)})
    write_dit(tmp_path / "release" / "transformer", state, "diffusers", "diffusion_pytorch_model")
    vae = tmp_path / "release" / "vae"
    vae.mkdir()
    vae_state = flux_2.vae_diffusers(flux_2.vae_state())
    save(vae / "diffusion_pytorch_model.safetensors", vae_state)
    words = ("--text_encoder", "model/text_encoder", *MADE[:-2], "--infer_steps", "1", "--seed", "1")
    floats = ("--vae_dtype", "float32", "--output_type", "latent")
    latents = []
    for dit, vae_file in (
        ("model/dit.safetensors", "model/vae.safetensors"),
        (tmp_path / "repa.safetensors", "model/vae.safetensors"),
        (tmp_path / "release", tmp_path / "release"),
    ):
        out = tmp_path / f"out{len(latents)}"
        files = ("--dit", dit, "--vae", vae_file, "--save_path", out)
        succeed_here(GENERATE[0], *files, *words, *floats, folder=folder)
        latents.append(load_file(next(out.glob("*.safetensors")))["latent"])
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])


@pytest.mark.parametrize(
    "part", ["0 0 64 64", "90000 0 1 1", "0 0 0 5", "-1 0 3 3", "1e3 0 2 2", "0 0 32 32"]
)
def test_latents_that_name_a_part_that_they_do_not_have(part: str, folder: Path, tmp_path: Path) -> None:
    """What cannot be a part is not read; the picture has 32 x 32 pixels."""
    latents = {"latent": torch.zeros(128, 1, 2, 2)}
    save_file(latents, tmp_path / "made_latent.safetensors", metadata={"bt_shown_part": part})
    words = ("--dit", "model/dit.safetensors", "--latent_path", tmp_path / "made_latent.safetensors")

    code, said = run_here(*GENERATE, *words, "--save_path", tmp_path / "out", folder=folder)

    if part in {"0 0 64 64", "90000 0 1 1", "0 0 0 5"}:
        assert_one_message(code, said, "made_latent.safetensors", "a region outside the image")
        return
    assert code == 0
    (image,) = (tmp_path / "out").glob("*.png")
    assert Image.open(image).size == (32, 32)
