"""What ERNIE-Image settles for a request and a training, and what it refuses before a network is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from ernie_image.configs import NOISE
from ernie_image.family import ErnieImage
from ernie_image.files import ErnieImageFiles
from modules.errors import CacheError, CheckpointError
from modules.flow.solvers import solver_for
from protocols.data import Batch
from protocols.families import list_same_latents
from protocols.requests import Prepared, Request
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.ernie_image import write_tiny_ernie_image
from tests.tiny.families import family_called
from tests.tiny.language_models import mistral3, write_mistral_tokenizer, write_model


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ErnieImage:
    files = write_tiny_ernie_image(tmp_path_factory.mktemp("models"))
    return ErnieImage(ErnieImageFiles(files.dit, vae=files.vae, text_encoder=files.text_encoder))


def prepare(family: ErnieImage, **asked: Any) -> Prepared:
    return family.prepare(Request("a cat", 1, **asked))


def test_what_is_not_said_is_as_in_diffusers(family: ErnieImage) -> None:
    prepared = prepare(family)

    assert (prepared.width, prepared.height, prepared.steps) == (1024, 1024, 50)
    assert (prepared.guidance_scale, prepared.negative_prompt, prepared.flow_shift) == ((4.0,), "", 4.0)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("models/ernie-image.safetensors", (50, 4.0)),
        ("models/ernie-image-turbo.safetensors", (8, 1.0)),
        ("ERNIE-Image-Turbo-Q4_K_M.gguf", (8, 1.0)),
        ("models--baidu--ERNIE-Image-Turbo/snapshots/1a/transformer", (8, 1.0)),
        ("ERNIE-Image/transformer", (50, 4.0)),
        ("my_ernie_de-turbo.safetensors", (50, 4.0)),
    ],
)
def test_a_name_says_the_release(family: ErnieImage, path: str, expected: tuple[int, float]) -> None:
    default = replace(family, files=replace(family.files, dit=Path(path))).defaults

    assert (default.steps, default.guidance_scale) == expected


@pytest.mark.parametrize("steps", [1, 8, 50])
def test_noise_levels_are_those_of_the_pipeline(family: ErnieImage, steps: int) -> None:
    """Shifted by 4 whatever the size; 8 steps are those of the release's Turbo."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=4.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1])

    for side in (512, 1024, 2048):
        prepared = prepare(family, steps=steps, width=side, height=side)
        sigmas = solver_for(prepared.solver, prepared.steps, prepared.flow_shift).schedule.sigmas
        torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=1e-6, atol=1e-7)
    if steps == 8:
        rounded = [1.0, 0.9655, 0.9231, 0.8696, 0.8, 0.7059, 0.5714, 0.3636, 0.0]
        torch.testing.assert_close(sigmas, torch.tensor(rounded), rtol=0, atol=5e-5)


def test_a_training_learns_noise_less_picture_at_1000_times_the_share_of_noise() -> None:
    latents, noise = torch.zeros(1, 2), torch.ones(1, 2)
    assert (NOISE.training_offset, NOISE.output_sign) == (0, 1)
    assert torch.equal(NOISE.velocity(latents, noise, torch.ones(1)), noise - latents)


def test_a_text_cache_of_another_encoder_is_refused_with_what_to_do(family: ErnieImage) -> None:
    latents = torch.zeros(1, 128, 1, 4, 4)
    given: dict[str, Any] = {"latents": latents, "ministral3_embed": [torch.zeros(3, 8)]}
    batch = Batch(given, ("a cat",), ("a.png",))

    with pytest.raises(CacheError, match=r"has width 8.*ernie_image_cache_text_encoder_outputs\.py"):
        family.batch_conditions(latents, batch)
    with pytest.raises(CacheError, match="has no ministral3_embed"):
        family.batch_conditions(latents, replace(batch, tensors={"latents": latents}))


def test_an_encoder_of_another_width_is_refused(family: ErnieImage, tmp_path: Path) -> None:
    """As the larger Mistral of FLUX.2 dev, whose file has the same names."""
    write_mistral_tokenizer(tmp_path)
    model = mistral3()
    write_model(tmp_path / "model.safetensors", model)
    files = replace(family.files, text_encoder=tmp_path)
    with pytest.raises(CheckpointError, match=r"rotary frequencies of type default(.|\n)*ministral-3-3b"):
        files.check()
    wide = write_tiny_ernie_image(tmp_path / "wide", text_dim=96)
    files = replace(family.files, dit=wide.dit)
    with pytest.raises(CheckpointError, match=r"width 64(.|\n)*takes width 96(.|\n)*ministral-3-3b"):
        files.check()


def test_latents_are_normalized_with_a_smaller_number_than_flux_2_s(family: ErnieImage) -> None:
    """So their caches are not shared."""
    state = load_file(family.files.vae_path)
    deviation = family.files.load_vae(torch.device("cpu")).deviation.flatten()
    torch.testing.assert_close(deviation, (state["bn.running_var"] + 1e-5).sqrt(), rtol=1e-6, atol=0)
    assert list_same_latents("ernie_image") == {"ernie_image"}
    assert "ernie_image" not in list_same_latents("flux_2")


def test_latent_caches_of_flux_2_are_not_taken_and_are_named(tmp_path: Path) -> None:
    flux_2, ernie = family_called("flux_2"), family_called("ernie_image")
    flux_2.prepare(tmp_path)
    succeed_here(*flux_2.cache_latents, folder=tmp_path)
    model = tmp_path / "model"
    model.rename(tmp_path / "model of flux_2")
    write_tiny_ernie_image(model)
    dataset = tmp_path / "dataset.toml"
    lines = dataset.read_text(encoding="utf-8").splitlines()
    without_control = [line for line in lines if not line.startswith("control_directory")]
    dataset.write_text("\n".join(without_control), encoding="utf-8")

    code, said = run_here(*ernie.train, "--output_dir", "out", "--output_name", "lora", folder=tmp_path)

    message = assert_one_message(code, said)
    assert "_f2k4b.safetensors is for flux_2_klein_4b" in message
    assert "ernie_image_cache_latents.py" in said


def test_a_training_on_turbo_is_warned_of(tmp_path: Path) -> None:
    from ernie_image.family import family_for_training
    from ernie_image.options import ErnieImageTrainingOptions

    described = family_for_training(ErnieImageTrainingOptions(dit=tmp_path / "ernie-image-turbo.safetensors"))
    replaced = write_tiny_ernie_image(tmp_path, name="ernie-image-turbo")
    assert described.files.dit == replaced.dit
    assert "ernie-image-turbo" in str(described.few_steps_evidence())
    advice = described.few_steps.advice_for_lora
    assert "Train on the base (ernie-image.safetensors), whose LoRAs work on Turbo too" in advice


@pytest.mark.parametrize("size", [(48, 80), (80, 48)], ids=str)
def test_pictures_need_not_be_square(tmp_path: Path, size: tuple[int, int]) -> None:
    from PIL import Image

    family = family_called("ernie_image")
    write_tiny_ernie_image(tmp_path / "model")
    more = ["--prompt", "a cat", "--image_size", *size, "--infer_steps", "1", "--save_path", "out"]
    succeed_here(*family.generate, *more, folder=tmp_path)
    (made,) = (tmp_path / "out").glob("*.png")
    assert Image.open(made).size == (size[1], size[0])
