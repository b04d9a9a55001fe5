"""What Qwen-Image-Edit makes of pictures: sizes, texts that see them, caches, what stays, and refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from PIL import Image
from safetensors.torch import load_file, save_file

import qwen_image_generate_image
from dataset.cache.records import latent_record, record_metadata
from dataset.cache_files import read_entry
from generation.latent_masks import blur, find_changes, restore_outside_mask, restore_unchanged_regions
from modules.errors import CacheError, OptionError
from modules.flow.solvers import solver_for
from protocols.data import Batch, CacheOrigin
from protocols.requests import Prepared, Request
from protocols.rules import ConsistencyRules
from protocols.steps import EditReference, Section
from qwen_image.family import QwenImage, family_for_generation
from qwen_image.files import EDIT_SETTINGS, PLUS_SETTINGS, QWEN_SETTINGS
from qwen_image.options import (
    LAYERED,
    VERSIONS,
    QwenImageGenerationOptions,
    QwenImageReferenceOptions,
    QwenImageTrainingOptions,
    QwenImageVersionOptions,
    caching_options,
    generation_options,
)
from qwen_image.references import AS_TRAINED, MEGAPIXEL, SHOWN_AREA, official_size, read_mask, read_reference
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.foreign_caches import train_with_and_without_records
from tests.tiny.dit_files import TinyModel
from tests.tiny.families import TinyFamily, family_called
from tests.tiny.project import write_image
from tests.tiny.qwen_image import write_tiny_qwen_image
from training.samples import warn_about_unused_keys


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_qwen_image(tmp_path_factory.mktemp("models"), edits=True)


def family_of(files: TinyModel, version: str = "edit-2509", **edit: Any) -> QwenImage:
    options = QwenImageGenerationOptions.from_defaults(
        dit=files.dit,
        version=QwenImageVersionOptions(model_version=version),
        references=QwenImageReferenceOptions(**edit),
    )
    made = family_for_generation(options)
    return replace(made, files=replace(made.files, vae=files.vae, text_encoder=files.text_encoder))


def prepare(family: QwenImage, *paths: Path, **asked: Any) -> Prepared:
    return family.prepare(Request("a hat", 1, control_images=paths, **asked))


def test_official_sizes_are_those_of_the_release() -> None:
    for size in ((131, 75), (1000, 1000), (333, 2000), (4000, 37)):
        expected = calculate_dimensions(MEGAPIXEL, size[0] / size[1])
        assert official_size(size, MEGAPIXEL) == tuple(max(int(side), 32) for side in expected)


def test_a_request_without_a_picture_is_told_and_no_option_that_nobody_typed(
    files: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    of_training = replace(family_of(files), edit=AS_TRAINED)
    prepare(of_training)
    assert "Qwen-Image-Edit-2509 edits images, but 'a hat' has none" in caplog.text
    assert "ignored" not in caplog.text
    caplog.clear()
    prepare(family_of(files, "original"))
    assert not caplog.text


def test_a_picture_is_stretched_or_cut_or_fitted(tmp_path: Path) -> None:
    pixels = numpy.random.default_rng(1).integers(0, 256, (75, 131, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    own = read_reference(tmp_path / "a.png")
    official = read_reference(tmp_path / "a.png", area=SHOWN_AREA)
    fitted = read_reference(tmp_path / "a.png", (64, 64))

    assert torch.equal(own, torch.from_numpy(pixels[:64, :128].copy()))
    expected = Image.fromarray(pixels).resize((512, 288), Image.Resampling.LANCZOS)
    assert torch.equal(official, torch.from_numpy(numpy.array(expected)))
    assert fitted.shape == (64, 64, 3)


def test_every_text_of_a_request_sees_the_pictures(files: TinyModel, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 64, 48)
    write_image(tmp_path / "b.png", 48, 96)
    paths = (tmp_path / "a.png", tmp_path / "b.png")

    prepared = prepare(family_of(files), *paths, nag_prompt="red")
    fitted = prepare(family_of(files, resize_control_to_image_size=True), *paths, width=96, height=64)

    texts = prepared.prompts[0]
    found = [texts.positive, texts.negative, texts.blank, texts.nag]
    assert [one.images for one in found if one is not None] == [paths] * 4
    assert fitted.prompts[0].positive.image_size == (96, 64)
    assert texts.positive.image_size is None
    # a size that is not said: a megapixel in the shape of the last picture
    assert (prepared.width, prepared.height) == official_size((48, 96), MEGAPIXEL)


def test_templates_are_those_of_the_releases() -> None:
    """Their tokens before the prompt, counted by the released tokenizer: 34 and 64."""
    assert (
        QWEN_SETTINGS.num_dropped_tokens,
        EDIT_SETTINGS.num_dropped_tokens,
        PLUS_SETTINGS.num_dropped_tokens,
    ) == (34, 64, 64)
    assert EDIT_SETTINGS.image_format is not None
    assert PLUS_SETTINGS.image_format is not None
    assert (
        EDIT_SETTINGS.image_format.write(1, 2) == "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    )
    assert PLUS_SETTINGS.image_format.write(2, 1) == "Picture 2: <|vision_start|><|image_pad|><|vision_end|>"
    assert len({use.fingerprint for use in (QWEN_SETTINGS, EDIT_SETTINGS, PLUS_SETTINGS)}) == 3


@pytest.mark.parametrize(
    ("names", "version", "message"),
    [
        (["dot.png"], "edit-2511", r"dot.png: 1 x 1 pixels are too few, each side needs at least 16"),
        (["good.png"] * 2, "edit", r"2 reference images, but Qwen-Image-Edit takes 1 at most"),
        (["good.png"], "original", r"--control_image_path: Qwen-Image generates images from text alone."),
    ],
)
def test_a_picture_that_cannot_be_used_is_refused(
    files: TinyModel, tmp_path: Path, names: list[str], version: str, message: str
) -> None:
    write_image(tmp_path / "dot.png", 1, 1)
    write_image(tmp_path / "good.png", 32, 32)

    with pytest.raises(OptionError, match=message):
        prepare(family_of(files, version), *(tmp_path / name for name in names), width=32, height=32)


def test_what_stays_needs_a_picture_of_the_size_of_the_result(files: TinyModel, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 70, 48)
    sized = {"width": 96, "height": 48}
    family, mask = family_of(files, rcm_threshold=0.1), {"mask_path": str(tmp_path / "none.png")}

    with pytest.raises(
        OptionError, match=r"--rcm_threshold: .*a.png is read with 64 x 48 .* --image_size 48 64"
    ):
        prepare(family, tmp_path / "a.png", **sized)
    with pytest.raises(OptionError, match=r"--mask_path .*none.png: no such file"):
        prepare(family_of(files), tmp_path / "a.png", width=64, height=48, extra=mask)


def test_what_holds_to_a_picture_is_not_ignored_in_silence(files: TinyModel, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 64, 48)
    (tmp_path / "text.png").write_text("a cat", encoding="utf-8")
    sized: dict[str, Any] = {"width": 64, "height": 48}
    masked = {"extra": {"mask_path": str(tmp_path / "a.png")}, **sized}

    for version in (name for name in VERSIONS if name != LAYERED):
        with pytest.raises(OptionError, match=r"--mask_path .*a.png: there is no image to keep. Pass"):
            prepare(family_of(files, version), **masked)
    with pytest.raises(OptionError, match=r"a.png \(in a prompt line\): omit --rcm_threshold"):
        prepare(family_of(files, rcm_threshold=0.1), tmp_path / "a.png", **masked)
    masked["extra"] = {"mask_path": str(tmp_path / "text.png")}
    with pytest.raises(OptionError, match=r"--mask_path: .*text.png is not an image.*Pass an image file"):
        prepare(family_of(files), tmp_path / "a.png", **masked)


def test_a_mask_is_white_where_the_picture_changes(tmp_path: Path) -> None:
    mask = Image.new("L", (32, 16))
    mask.paste(255, (16, 0, 32, 16))
    mask.save(tmp_path / "mask.png")

    found = read_mask(tmp_path / "mask.png", (64, 32), 8)

    assert found.shape == (1, 1, 1, 4, 8)
    assert found[0, 0, 0].sum(0).tolist() == [0, 0, 0, 0, 4, 4, 4, 4]


def test_changes_are_found_blurred_and_enlarged() -> None:
    difference = torch.zeros(1, 16, 1, 9, 9)
    difference[..., 4, 4] = 1.0

    def count(**rules: Any) -> int:
        return int(find_changes(difference, ConsistencyRules(**rules)).sum())

    assert count(threshold=0.5, kernel_size=1) == 1
    assert count(threshold=0.01, kernel_size=3) == 9
    assert count(threshold=0.5, kernel_size=1, dilate_size=2) == 25
    assert count(threshold=0.9, kernel_size=3, is_relative=True) == 1
    assert not find_changes(0 * difference, ConsistencyRules(0.2, is_relative=True)).any()
    assert torch.allclose(blur(torch.ones(1, 2, 1, 5, 5), 5), torch.ones(1, 2, 1, 5, 5))


def test_what_hardly_differs_is_set_back_before_a_step_and_what_a_mask_keeps_behind_it() -> None:
    schedule = solver_for("euler", 4, 1.0).schedule
    noise, clean = torch.randn(1, 2, 1, 4, 4), torch.ones(1, 2, 1, 4, 4)
    level = float(schedule.sigmas[1])
    held = (1 - level) * clean + level * noise
    latents = held + 0.01
    latents[..., 0, 0] += 1
    mask = torch.zeros(1, 1, 1, 4, 4)
    mask[..., 3] = 1

    def section(**anchor: Any) -> Section:
        return Section(noise, {}, edit_reference=EditReference(clean, **anchor))

    kept = restore_unchanged_regions(
        section(rules=ConsistencyRules(0.1, kernel_size=1)), latents, schedule, 1
    )
    masked = restore_outside_mask(section(changed_mask=mask), latents, schedule, 1)

    assert torch.allclose(kept[..., 1:, :], held[..., 1:, :])
    assert torch.equal(kept[..., 0, 0], latents[..., 0, 0])
    assert torch.equal(masked[..., 3], latents[..., 3])
    assert torch.allclose(masked[..., :3], held[..., :3])
    assert torch.equal(
        restore_outside_mask(section(changed_mask=mask), latents, schedule, 4)[..., :3], clean[..., :3]
    )
    assert restore_unchanged_regions(Section(noise, {}), latents, schedule, 1) is latents


def test_changed_parts_are_written_and_results_named_after_their_picture(
    files: TinyModel, tmp_path: Path
) -> None:
    write_image(tmp_path / "my cat.png", 48, 32)
    edit = "--prompt hat --image_size 32 48 --infer_steps 3 --guidance_scale 1 --seed 3 --device cpu --edit"
    words = [*files.models, *edit.split(), "--control_image_path", str(tmp_path / "my cat.png")]
    rcm = "--rcm_threshold 0.9 --rcm_relative_threshold --rcm_debug_save --append_original_name"

    qwen_image_generate_image.main([*words, *rcm.split(), "--save_path", str(tmp_path / "out")])
    qwen_image_generate_image.main([*words, "--save_path", str(tmp_path / "plain")])

    made = sorted(path.name.partition("_3_")[2] for path in (tmp_path / "out").iterdir())
    assert made == ["my cat.png", *(f"my cat_rcm_00{step}.png" for step in range(3))]
    shown = [Image.open(path) for path in sorted((tmp_path / "out").glob("*_rcm_*.png"))]
    assert {one.size for one in shown} == {(6, 4)}
    kept = numpy.array(Image.open(next((tmp_path / "out").glob("*_my cat.png"))))
    assert (kept != numpy.array(Image.open(next((tmp_path / "plain").iterdir())))).any()


def project(folder: Path) -> TinyFamily:
    family = family_called("qwen_image edit-2511")
    family.prepare(folder)
    return family


def test_caches_of_the_known_tuner_are_trained_on_as_they_are(tmp_path: Path) -> None:
    """The number of references differs; latents say `qwen_image`, as there."""
    family = project(tmp_path)
    (tmp_path / "control" / "picture 1.png").unlink()
    for number in range(2):
        write_image(tmp_path / "control" / f"picture 1_{number}.png", 32, 64)
    (tmp_path / "control" / "picture 3.png").unlink()

    found = train_with_and_without_records(family, tmp_path, "qwen_image")

    shapes = {name[:9]: one for name, one in found.items() if not name.endswith("_te.safetensors")}
    target = {"latents_1x6x6_float32": (16, 1, 6, 6)}
    assert shapes["picture 0"] == target | {"latents_control_0_1x6x6_float32": (16, 1, 6, 6)}
    assert shapes["picture 1"] == target | {
        f"latents_control_{number}_1x8x4_float32": (16, 1, 8, 4) for number in range(2)
    }
    assert shapes["picture 3"] == target


def test_caches_of_another_release_are_one_message(files: TinyModel, tmp_path: Path) -> None:
    """Those of `original` have other names; those of edit and edit-2509 the same, and another template."""
    family = project(tmp_path)
    plain = [one for one in family.train if one not in ("--model_version", "edit-2511")]
    said = succeed_here(*family.cache_latents, folder=tmp_path)
    assert "text_encoder_outputs.py --text_encoder QWEN_FILE --model_version edit-2511" in said

    name = "--output_name", "lora"
    code, said = run_here(*plain, "--max_train_steps", "1", "--output_dir", "out", *name, folder=tmp_path)
    assert_one_message(code, said, "qwen_image_cache_latents.py")

    latents = torch.zeros(1, 16, 1, 4, 4)
    (encoder,) = family_of(files, "edit").text_encoders()
    made = CacheOrigin(tmp_path / "a_qie_te.safetensors", encoder.name, encoder.identity)
    batch = Batch({"latents": latents, "vl_embed": [torch.zeros(3, 64)]}, ("a",), ("a",), (made,))
    family_of(files, "edit").batch_conditions(latents, batch)
    with pytest.raises(CacheError, match=r"a_qie_te.*for Qwen-Image-Edit, this .* of Qwen-Image-Edit-2511"):
        family_of(files, "edit-2511").batch_conditions(latents, batch)


@pytest.mark.slow
def test_the_plan_counts_references_and_the_vision_tower(
    files: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "a.png", 160, 160)
    words = "--prompt hat --image_size 64 64 --plan 8 --save_path out"
    plan = [*files.models, *words.split()]
    path = str(tmp_path / "a.png")

    qwen_image_generate_image.main(plan)
    plain = capsys.readouterr().out
    qwen_image_generate_image.main([*plan, "--edit_plus", "--control_image_path", path, path])
    edited = capsys.readouterr().out

    assert "text encoder vl" in plain
    assert "images and videos" not in plain
    assert "images and videos" in edited


@pytest.mark.slow
def test_latents_of_the_version_that_read_other_pixels_are_refused_and_made_anew(tmp_path: Path) -> None:
    """Their records name the VAE alone."""
    family = project(tmp_path)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    paths = sorted((tmp_path / "cache").glob("*_qie.safetensors"))
    right = [path.read_bytes() for path in paths]
    for path in paths:
        header = read_entry(path, is_full=False)
        record = latent_record(header)
        assert record is not None
        record = replace(record, encoder={"vae": record.encoder["vae"]})
        save_file(load_file(path), path, {**header.metadata, **record_metadata(record)})
    train = (*family.train, "--max_train_steps", "1", "--output_dir", "out", "--output_name", "lora")

    code, said = run_here(*train, folder=tmp_path)
    assert_one_message(code, said, "an earlier version encoded these latents", "qwen_image_cache_latents.py")
    succeed_here(*family.cache_latents, "--skip_existing", folder=tmp_path)

    assert [path.read_bytes() for path in paths] == right
    succeed_here(*train, folder=tmp_path)


def test_a_text_encoder_without_its_vision_tower_is_one_message(tmp_path: Path) -> None:
    blind = write_tiny_qwen_image(tmp_path / "models")
    write_image(tmp_path / "a.png", 32, 32)

    with pytest.raises(Exception, match=r"has no vision tower, which prompts with images need. Pass"):
        prepare(family_of(blind), tmp_path / "a.png", width=32, height=32)


@pytest.mark.parametrize("version", ["original", "edit-2511"])
def test_commands_of_a_training_name_its_release(version: str) -> None:
    options = QwenImageTrainingOptions.from_defaults(version=QwenImageVersionOptions(model_version=version))
    latents, texts = caching_options(options)
    expected = None if version == "original" else version
    assert (latents["--model_version"], texts["--model_version"]) == (expected, expected)
    words = generation_options(options, {"control_images": (Path("a.png"),)})
    assert words["--model_version"] == expected
    assert words["--resize_control_to_official_size"]


@pytest.mark.parametrize(("version", "expected"), [("edit-2511", "mask.png"), (LAYERED, None)])
def test_the_mask_of_a_sample_is_in_the_printed_command(
    version: str, expected: str | None, files: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Layered models have none."""
    options = QwenImageTrainingOptions.from_defaults(version=QwenImageVersionOptions(model_version=version))
    line = {"mask_path": "mask.png"}

    words = generation_options(options, {"extra": line})
    if version != LAYERED:
        warn_about_unused_keys([line], family_of(files, version), Path("prompts.txt"))

    assert words["--mask_path"] == expected
    assert not caplog.messages
