"""What FLUX.2 settles for a request, its references, caches of the known tuner, and refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image

from encoders.pictures import read_reference, references_in
from flux_2.family import AMONG_SEVERAL, MAX_REFERENCES, Flux2, empirical_mu
from flux_2.files import Flux2Files
from flux_2.versions import VERSIONS
from modules.errors import CacheError, CheckpointError, OptionError
from modules.flow.solvers import solver_for
from protocols.data import Batch
from protocols.requests import Prepared, Request
from tests.faults.messages import succeed_here
from tests.foreign_caches import train_with_and_without_records
from tests.manifests import tensor_list, write_hollow
from tests.tiny.families import family_called
from tests.tiny.flux_2 import (
    TinyFlux2,
    tiny_state,
    vae_state,
    write_dit,
    write_text_encoder,
    write_tiny_flux_2,
)
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import mistral3, write_model
from tests.tiny.project import write_image, write_plain_images


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> TinyFlux2:
    return write_tiny_flux_2(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> TinyFlux2:
    return write_tiny_flux_2(tmp_path_factory.mktemp("dev"), "dev")


def family_of(files: TinyFlux2, version: str = "") -> Flux2:
    others = {"vae": files.vae, "text_encoder": files.text_encoder}
    return Flux2(Flux2Files(files.dit, **others, model_version=version or files.version))


def prepare(family: Flux2, **asked: Any) -> Prepared:
    return family.prepare(Request("a cat", 1, **asked))


@pytest.mark.parametrize(
    ("version", "steps", "scale", "embedded", "tag"),
    [
        ("klein-4b", 4, 1.0, None, "f2k4b"),
        ("klein-base-4b", 50, 4.0, None, "f2k4b"),
        ("klein-9b", 4, 1.0, None, "f2k9b"),
        ("klein-base-9b", 50, 4.0, None, "f2k9b"),
        ("dev", 50, 1.0, 4.0, "f2d"),
    ],
)
def test_what_is_not_said_is_as_the_version_says(
    request: pytest.FixtureRequest, version: str, steps: int, scale: float, embedded: float | None, tag: str
) -> None:
    family = family_of(request.getfixturevalue("dev" if version == "dev" else "klein"), version)

    prepared = prepare(family, embedded_guidance=embedded)

    assert (prepared.width, prepared.height, prepared.steps) == (1024, 1024, steps)
    assert (prepared.guidance_scale, prepared.embedded_guidance) == ((scale,), embedded)
    assert (family.cache_tag, family.metadata["architecture"]) == (tag, VERSIONS[version].architecture)


def test_guidance_that_a_distilled_model_does_not_take_is_ignored_with_a_warning(
    klein: TinyFlux2, caplog: pytest.LogCaptureFixture
) -> None:
    assert prepare(family_of(klein, "klein-4b"), guidance_scale=4.0).guidance_scale == (1.0,)
    assert "the guidance scale 4 is ignored: --model_version klein-4b is distilled" in caplog.text


@pytest.mark.parametrize(("asked", "is_told"), [(4.0, False), (3.0, True)])
def test_embedded_guidance_that_klein_does_not_take_is_ignored_with_a_warning(
    klein: TinyFlux2, asked: float, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert prepare(family_of(klein), embedded_guidance=asked).embedded_guidance is None

    said = "the embedded guidance 3 (--embedded_cfg_scale) is ignored: --model_version klein-base-4b has no"
    assert (said in caplog.text) is is_told


@pytest.mark.parametrize(("steps", "width", "height"), [(4, 1024, 1024), (50, 512, 768), (28, 1536, 1024)])
def test_noise_levels_are_those_of_the_release(klein: TinyFlux2, steps: int, width: int, height: int) -> None:
    prepared = prepare(family_of(klein), steps=steps, width=width, height=height)
    tokens = (width // 16) * (height // 16)
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    theirs.set_timesteps(sigmas=numpy.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))

    schedule = solver_for(prepared.solver, steps, prepared.flow_shift).schedule

    assert torch.allclose(schedule.sigmas, theirs.sigmas, atol=1e-6)
    assert empirical_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))
    assert prepare(family_of(klein), flow_shift=3.0).flow_shift == 3.0


@pytest.mark.parametrize("size", [(75, 131), (1500, 1100), (2100, 700)], ids=str)
def test_a_reference_is_reduced_and_cut_as_in_diffusers(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = numpy.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    ours = read_reference(tmp_path / "a.png", AMONG_SEVERAL, 16)[0, 0]

    image, processor = Image.fromarray(pixels), Flux2ImageProcessor()
    if size[0] * size[1] > AMONG_SEVERAL:
        image = processor._resize_to_target_area(image, AMONG_SEVERAL)
    width, height = (side // 16 * 16 for side in image.size)
    there = processor.preprocess(image, height=height, width=width, resize_mode="crop")[0]
    expected = ((there + 1) * 127.5).round().permute(1, 2, 0).to(torch.uint8)
    assert torch.equal(ours, expected)
    own = read_reference(tmp_path / "a.png", None, 16)
    assert own.shape == (1, 1, size[1] // 16 * 16, size[0] // 16 * 16, 3)


def test_caches_of_the_known_tuner_are_trained_on_as_they_are(tmp_path: Path) -> None:
    """One picture has one reference."""
    family = family_called("flux_2")
    family.prepare(tmp_path)
    write_image(tmp_path / "control" / "picture 0_0.png", 70, 80)
    (tmp_path / "control" / "picture 3_1.png").unlink()

    shapes = train_with_and_without_records(family, tmp_path, "flux_2_klein_4b")

    assert shapes["picture 0_0048x0048_f2k4b.safetensors"] == {
        "latents_3x3_float32": (128, 3, 3),
        "latents_control_0_5x4_float32": (128, 5, 4),
        "latents_control_1_3x3_float32": (128, 3, 3),
    }
    assert shapes["picture 3_0048x0048_f2k4b.safetensors"].keys() == {
        "latents_3x3_float32",
        "latents_control_0_3x3_float32",
    }
    assert shapes["picture 0_f2k4b_te.safetensors"] == {"ctx_vec_float32": (512, 192)}


def test_a_batch_needs_its_text_and_references_that_are_some(klein: TinyFlux2, dev: TinyFlux2) -> None:
    family, latents = family_of(klein), torch.zeros(1, 128, 1, 3, 3)
    given: dict[str, Any] = {"ctx_vec": torch.zeros(1, 512, 192)}
    images = {f"latents_control_{number}": torch.full_like(latents, number) for number in (10, 2, 1)}

    found = family.batch_conditions(latents, Batch({**given, **images}, ("",), ("a",)))

    assert set(found) == {"ctx_vec", *images}
    assert [one.flatten()[0] for one in references_in(found, latents.device)] == [1, 2, 10]
    trained = replace(family_of(dev), trained_guidance=1.5)
    assert trained.batch_conditions(latents, Batch(given, ("",), ("a",)))["guidance"] == torch.tensor([1.5])
    with pytest.raises(
        CacheError, match=r"a: the cache has no ctx_vec.*flux_2_cache_text_encoder_outputs.py"
    ):
        family.batch_conditions(latents, Batch({}, ("",), ("a",)))
    with pytest.raises(CacheError, match=r"has width 8.*--model_version klein-base-4b and a Qwen3"):
        family.batch_conditions(latents, Batch({"ctx_vec": torch.zeros(1, 512, 8)}, ("",), ("a",)))
    wrong = {**given, "latents_control_0": torch.zeros(1, 16, 1, 3, 3)}
    with pytest.raises(
        CacheError, match=r"a: latents_control_0 .* is 16x1x3x3, .* one image. Cache.* flux_2_"
    ):
        family.batch_conditions(latents, Batch(wrong, ("",), ("a",)))


def test_more_references_than_it_was_made_for_are_refused(klein: TinyFlux2, tmp_path: Path) -> None:
    write_image(tmp_path / "good.png", 32, 32)
    with pytest.raises(OptionError, match=rf"11 reference images, but FLUX.2 takes {MAX_REFERENCES}"):
        prepare(family_of(klein), control_images=(tmp_path / "good.png",) * 11)


def test_files_of_another_version_are_refused(klein: TinyFlux2, dev: TinyFlux2, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"is a FLUX.2 klein transformer .* not that of --model_version dev"
    ):
        prepare(family_of(klein, "dev"))
    with pytest.raises(
        OptionError, match=r"dev transformer .* --model_version klein-4b. Pass .* such as dev"
    ):
        prepare(family_of(dev, "klein-4b"))
    wide = write_hollow(tmp_path / "9b.safetensors", tensor_list("flux2-klein-9b-dit"))
    with pytest.raises(OptionError, match=r"of width 4096, not that of --model_version klein-4b.*klein-9b"):
        Flux2Files(wide, model_version="klein-4b").dit_header()
    narrow = replace(klein, dit=write_dit(tmp_path / "narrow", tiny_state(text_dim=96)))
    with pytest.raises(
        CheckpointError, match=r"produces hidden states of width 192, .* takes width 96. Pass qwen_3_4b"
    ):
        prepare(family_of(narrow))
    mistral = write_text_encoder(tmp_path / "mistral", "dev")
    with pytest.raises(CheckpointError, match=r"not a Qwen3 language model.*(.|\n)*--text_encoder"):
        prepare(family_of(replace(klein, text_encoder=mistral)))
    qwen = write_hollow(tmp_path / "qwen.safetensors", tensor_list("qwen3-4b"))
    of_9b = Flux2Files(text_encoder=qwen, model_version="klein-9b")
    with pytest.raises(
        OptionError, match=r"qwen.* is the text encoder of --model_version klein-4b and klein-b"
    ):
        of_9b.check()  # as before captions are encoded
    short = write_model(tmp_path / "short" / "model.safetensors", mistral3(12))
    with pytest.raises(CheckpointError, match=r"has only 12 layers, but 30 are needed. Pass mistral_3_small"):
        prepare(family_of(replace(dev, text_encoder=short)))


def test_the_next_command_has_the_version_too(tmp_path: Path) -> None:
    write_plain_images(tmp_path)
    save(tmp_path / "vae.safetensors", vae_state())
    words = "--model_version klein-4b --vae vae.safetensors --vae_dtype float32 --dataset_config dataset.toml"

    said = succeed_here("flux_2_cache_latents.py", *words.split(), folder=tmp_path)

    # whatever folder the script is in
    assert " --text_encoder TEXT_ENCODER_FILE --model_version klein-4b --dataset_config dataset.toml" in said
