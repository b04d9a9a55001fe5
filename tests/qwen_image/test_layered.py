"""What Qwen-Image-Layered settles for a request, refuses, caches and predicts."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from generation.progress import show_start
from generation.saved_latents import check_latents
from modules.errors import CacheError, CheckpointError, OptionError
from modules.flow.solvers import solver_for
from protocols.data import CONTROL, Batch, MediaBatch
from protocols.requests import Prepared, Request
from protocols.steps import Overrides
from qwen_image.family import QwenImage
from qwen_image.files import VERSIONS, QwenImageReleaseFiles
from qwen_image.layered import QwenImageLayered
from qwen_image.model import QwenImageModel
from tests.parity.pipelines import qwen_image_vae
from tests.tiny.dit_files import TinyModel
from tests.tiny.project import write_image
from tests.tiny.qwen_image import CONFIG, tiny_state, write_tiny_qwen_image

CPU = torch.device("cpu")
LAYERED = VERSIONS["layered"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_qwen_image(tmp_path_factory.mktemp("models"), layered=True)


@pytest.fixture(scope="module")
def family(files: TinyModel) -> QwenImageLayered:
    return QwenImageLayered(
        QwenImageReleaseFiles(files.dit, vae=files.vae, text_encoder=files.text_encoder, version=LAYERED)
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    write_image(path, 320, 160)
    return path


def prepare(family: QwenImageLayered, picture: Path, **asked: Any) -> Prepared:
    return family.prepare(Request("a cat", 1, control_images=(picture,), **asked))


def test_a_picture_and_its_layers_have_640_pixels_squared_in_its_shape(
    family: QwenImageLayered, picture: Path
) -> None:
    prepared = prepare(family, picture)

    assert (prepared.width, prepared.height, prepared.frames) == (896, 448, 5)
    assert (prepared.steps, prepared.guidance_scale, prepared.negative_prompt) == (50, (4.0,), " ")
    assert prepared.rules.norm_patch_size is None
    assert prepare(family, picture, frames=2).frames == 3  # of a training's sample
    assert prepare(family, picture, extra={"output_layers": "6"}, frames=2).frames == 7


def test_the_plan_of_a_generation_speaks_of_pictures(
    family: QwenImageLayered, picture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    prepared = prepare(family, picture, width=64, height=64, steps=3)

    for requests in ([prepared], [prepared, prepared]):
        show_start(family, requests, {}, tmp_path, CPU)

    (one, two) = [text for text in caplog.messages if "Generating" in text]
    assert re.search(r"image: +64 x 64 \(width x height\), 5 images, 3 steps", one)
    assert re.search(r"images: +2; the first: 64 x 64 .*, 5 images, 3 steps", two)


@pytest.mark.parametrize(("width", "height", "shift"), [(640, 640, 2.5), (1024, 1024, 4.0)])
def test_noise_levels_are_shifted_by_the_root_of_the_tokens(
    family: QwenImageLayered, tmp_path: Path, width: int, height: int, shift: float
) -> None:
    write_image(tmp_path / "a.png", width, height)

    prepared = prepare(family, tmp_path / "a.png", width=width, height=height, steps=2)

    sigmas = solver_for(prepared.solver, 2, prepared.flow_shift).schedule.sigmas
    assert torch.allclose(sigmas, torch.tensor([1.0, shift / (shift + 1), 0.0]))


def test_with_a_size_the_picture_keeps_its_own_unless_it_is_to_have_that_of_the_layers(
    family: QwenImageLayered, picture: Path
) -> None:
    own = prepare(family, picture, width=64, height=64)
    fitted = prepare(
        replace(family, edit=replace(family.edit, resize_control_to_image_size=True)),
        picture,
        width=64,
        height=64,
    )

    assert own.flow_shift == pytest.approx((20 * 10 / 256) ** 0.5)
    assert fitted.flow_shift == pytest.approx((4 * 4 / 256) ** 0.5)


@pytest.mark.parametrize("count", [0, 2])
def test_anything_but_one_picture_is_refused(family: QwenImageLayered, picture: Path, count: int) -> None:
    with pytest.raises(OptionError, match=f"{count} images, but Qwen-Image-Layered decomposes one"):
        family.prepare(Request("a cat", 1, control_images=(picture,) * count))


@pytest.mark.parametrize("count", [0, 65])
def test_a_number_of_layers_that_cannot_be_is_refused(
    family: QwenImageLayered, picture: Path, count: int
) -> None:
    with pytest.raises(OptionError, match=f"--output_layers {count} .*pass 1 to 64 layers"):
        prepare(family, picture, extra={"output_layers": str(count)})


def test_files_of_another_release_are_refused_with_what_to_give(files: TinyModel, tmp_path: Path) -> None:
    others = write_tiny_qwen_image(tmp_path / "others")
    cases = (
        (
            QwenImageReleaseFiles(others.dit, version=LAYERED),
            "has no time_text_embed.addition_t_embedding.weight",
        ),
        (
            QwenImageReleaseFiles(files.dit),
            "which splits images into layers; Qwen-Image needs a different one",
        ),
        (
            QwenImageReleaseFiles(vae=others.vae, version=LAYERED),
            "without alpha(.|\n)*qwen_image_layered_vae",
        ),
        (QwenImageReleaseFiles(vae=files.vae), "with alpha; Qwen-Image needs(.|\n)*Wan2.1_VAE.pth"),
    )
    for given, message in cases:
        with pytest.raises(CheckpointError, match=message):
            given.check()


@torch.no_grad()
def test_each_layer_is_encoded_by_itself_as_in_diffusers(family: QwenImageLayered, files: TinyModel) -> None:
    pixels = torch.from_numpy(numpy.random.default_rng(2).integers(0, 256, (1, 3, 32, 48, 4), numpy.uint8))
    loaded = replace(family, files=replace(family.files, vae_dtype=torch.float32))
    encoders = loaded.media_encoders(CPU)

    ((entry,),) = loaded.encode_media(encoders, MediaBatch(pixels, ("a",), ((0, 3),)))

    theirs = qwen_image_vae(files.vae, colors=4)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in statistics(theirs))
    for index in range(3):
        frame = pixels[:, index : index + 1].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        expected = (theirs.encode(frame).latent_dist.mode()[0] - mean) / std
        torch.testing.assert_close(entry.tensors["latents"][:, index], expected[:, 0], atol=1e-4, rtol=1e-4)
    assert entry.grid == (1, 4, 6)  # in the name, as of the known tuner


def statistics(vae: Any) -> tuple[list[float], list[float]]:
    return vae.config.latents_mean, vae.config.latents_std


def make_batch(latents: Tensor) -> Batch:
    tensors: dict[str, Any] = {"latents": latents, "vl_embed": [torch.randn(4, CONFIG.text_dim)]}
    return Batch(tensors, ("a cat",), ("a.png",))


@torch.no_grad()
def test_the_picture_of_a_training_is_its_first_frame_and_may_be_left_out_of_what_is_made(
    family: QwenImageLayered,
) -> None:
    dit = QwenImageModel(replace(CONFIG, has_layers=True)).eval()
    dit.load_state_dict(tiny_state(has_layers=True))
    latents, noise = torch.randn(2, 1, 16, 3, 4, 6)
    cond = family.batch_conditions(latents, make_batch(latents))
    times = torch.tensor([500.0])
    noisy = (latents + noise) / 2

    full = family.predict(dit, noisy, times, cond)
    given = torch.cat([latents[:, :, :1], noisy[:, :, 1:]], dim=2)
    rest = replace(family, omits_first_image=True).predict(
        dit, given, times, cond, Overrides(num_clean_frames=1)
    )

    torch.testing.assert_close(cond[CONTROL], latents[:, :, :1])
    expected = family.predict(dit, noisy[:, :, 1:], times, cond)
    torch.testing.assert_close(rest[:, :, 1:], expected)
    assert not rest[:, :, 0].any()
    assert (full[:, :, 1:] - expected).abs().max() > 1e-3  # the frame in front is seen


def test_a_cache_without_layers_is_refused(family: QwenImageLayered) -> None:
    latents = torch.zeros(1, 16, 1, 4, 4)
    with pytest.raises(CacheError, match="without layers(.|\n)*multiple_target"):
        family.batch_conditions(latents, make_batch(latents))


def test_layers_are_written_with_what_they_show_together(tmp_path: Path) -> None:
    from modules.media.layers import write_layers

    def plain(color: int, alpha: int) -> Any:
        frame = numpy.full((2, 2, 4), color, numpy.uint8)
        frame[..., 3] = alpha
        return frame

    paths = write_layers(tmp_path, "a", [plain(9, 255), plain(200, 255), plain(100, 51)], True, {})

    assert [path.name for path in paths] == [
        "a_layer0.png",
        "a_layer1.png",
        "a_layer2.png",
        "a_composite.png",
    ]
    assert numpy.array(Image.open(paths[-1])).tolist() == [[[180, 180, 180, 255]] * 2] * 2  # .2 and .8
    alone = write_layers(tmp_path, "b", [plain(200, 0), plain(100, 51)], False, {})
    assert [path.name for path in alone] == ["b_layer1.png", "b_layer2.png", "b_composite.png"]
    assert numpy.array(Image.open(alone[-1]))[0, 0].tolist() == [100, 100, 100, 51]


def test_latents_of_layers_and_of_plain_pictures_are_not_mixed_up(
    family: QwenImageLayered, files: TinyModel, tmp_path: Path
) -> None:
    plain = QwenImage(QwenImageReleaseFiles(files.dit))

    def write(model: str | None) -> Path:
        path = tmp_path / f"{model}.safetensors"
        metadata = {} if model is None else {"bt_model_type": model}
        save_file({"latent": torch.zeros(16, 3, 4, 4)}, path, metadata)
        return path

    with pytest.raises(CheckpointError, match="made by qwen_image_layered, whose .* that of Qwen-Image"):
        check_latents(plain, write("qwen_image_layered"))
    with pytest.raises(CheckpointError, match="made by qwen_image, whose .* that of Qwen-Image-Layered"):
        check_latents(family, write("qwen_image"))
    for taken, model in ((plain, "qwen_image"), (family, "qwen_image_layered"), (family, None)):
        assert check_latents(taken, write(model)).latents.shape == (1, 16, 3, 4, 4)
