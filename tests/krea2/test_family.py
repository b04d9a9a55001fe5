"""What Krea 2 settles for a request, which files are Turbo, and what it refuses."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import krea2_generate_image
from generation.prompt_lines import parse_generation_line
from generation.request import prepare_line
from krea2.family import Krea2, family_for_samples
from krea2.files import Krea2Files, find_release, load_dit
from krea2.options import Krea2TrainingOptions
from modules.errors import CacheError, CheckpointError, OptionError
from modules.flow.solvers import solver_for
from protocols.data import Batch
from protocols.loading import Placement
from protocols.requests import Prepared, Request
from tests.manifests import tensor_list, write_hollow
from tests.tiny.krea2 import CONFIG, tiny_state, write_dit, write_tiny_krea2

CPU = Placement(torch.device("cpu"))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Krea2:
    files = write_tiny_krea2(tmp_path_factory.mktemp("models"))
    return Krea2(Krea2Files(files.dit, vae=files.vae, text_encoder=files.text_encoder))


@pytest.fixture
def turbo(family: Krea2, tmp_path: Path) -> Krea2:
    return replace(family, files=replace(family.files, dit=write_dit(tmp_path, tiny_state(), name="turbo")))


def prepare(family: Krea2, **asked: Any) -> Prepared:
    return family.prepare(Request("a cat", 1, **asked))


def test_noise_levels_of_raw_follow_the_size_and_those_of_turbo_do_not(family: Krea2, turbo: Krea2) -> None:
    """mu is 0.5 at 256 x 256 and 1.15 at 1280 x 1280, and goes on along the line."""
    default = prepare(family)
    assert (default.width, default.height, default.steps) == (1024, 1024, 28)
    assert (default.guidance_scale, default.negative_prompt) == ((5.5,), "")
    for side, mu in (
        (256, 0.5),
        (1280, 1.15),
        (1024, 0.5 + 0.65 * 3840 / 6144),
        (2048, 0.5 + 0.65 * 16128 / 6144),
    ):
        prepared = prepare(family, width=side, height=side, steps=4)
        assert prepared.flow_shift == pytest.approx(math.exp(mu))
        sigmas = solver_for(prepared.solver, 4, prepared.flow_shift).schedule.sigmas
        expected = [math.exp(mu) / (math.exp(mu) + 1 / sigma - 1) for sigma in (1, 0.75, 0.5, 0.25)]
        torch.testing.assert_close(sigmas, torch.tensor([*expected, 0.0]), rtol=1e-5, atol=1e-6)
        assert prepare(turbo, width=side, height=side).flow_shift == pytest.approx(math.exp(1.15))
    made = prepare(turbo)
    assert (made.steps, made.guidance_scale) == (8, (1.0,))


@pytest.mark.parametrize(
    ("extra", "mu"),
    [
        ({"mu": "0.8"}, 0.8),
        ({"mu": "0"}, 0.0),
        ({"y1": "1", "y2": "1"}, 1.0),
        ({"y2": "2"}, 0.5 + 1.5 * 3840 / 6144),
    ],
)
def test_noise_levels_can_be_asked_for(family: Krea2, turbo: Krea2, extra: dict[str, str], mu: float) -> None:
    for one in (family, turbo):
        assert prepare(one, extra=extra).flow_shift == pytest.approx(math.exp(mu))
        with pytest.raises(OptionError, match=f"--flow_shift and --{' --'.join(extra)}: each sets the noise"):
            prepare(one, extra=extra, flow_shift=3.0)
    with pytest.raises(OptionError, match="--mu 99: use a number from -20 to 20"):
        prepare(family, extra={"mu": "99"})


@pytest.mark.parametrize(
    ("path", "is_turbo"),
    [
        ("models/turbo.safetensors", True),
        ("krea2_Turbo_fp8_scaled.safetensors", True),
        ("models--krea--Krea-2-Turbo/snapshots/1a/transformer", True),
        ("Krea-2-Raw/transformer", False),
        ("turbo/raw.safetensors", False),
        ("Krea2TurboFP8.safetensors", True),
        ("krea2-turbofp8.safetensors", True),
        ("myturbomix.safetensors", True),
        ("krea2_distilled_8steps.safetensors", True),
        ("krea2_de-turbo.safetensors", False),
        ("krea2_non-turbo.safetensors", False),
        ("turbo_lora_merged_raw.safetensors", False),
        ("turbo/Krea2RawFP8.safetensors", False),
        ("/data/turbo/Krea-2-Raw/transformer", False),
        ("turbo/transformer.safetensors", True),
        ("strawberry_turbo.safetensors", True),
    ],
)
def test_a_name_says_which_one_it_is(family: Krea2, path: str, is_turbo: bool) -> None:
    """The same rule chooses the defaults, warns of a training, and refuses --turbo_dit."""
    named = replace(family, files=replace(family.files, dit=Path(path)))
    why, (_, where) = named.few_steps_evidence(), find_release(Path(path)) or (False, "")
    assert (named.defaults.steps, named.defaults.guidance_scale) == ((8, 1.0) if is_turbo else (28, 5.5))
    assert why == (f"{Path(path)} is Krea 2 Turbo: {where}" if is_turbo else None)
    options = Krea2TrainingOptions(turbo_dit=Path(path))
    if is_turbo:
        assert family_for_samples(options) is not None
    else:
        with pytest.raises(OptionError, match=re.escape(f"it is marked as raw ({where})")):
            family_for_samples(options)


def test_metadata_and_folders_say_it_too(tmp_path: Path) -> None:
    path = write_dit(tmp_path / "Krea-2-Turbo", tiny_state(), name="model")
    assert find_release(path) == (True, f"its folder is {tmp_path / 'Krea-2-Turbo'}")
    path = path.rename(tmp_path / "mine.safetensors")
    assert find_release(path) is None
    save_file(load_file(path), path, {"modelspec.title": "Krea 2 Turbo"})
    assert find_release(path) == (True, "its modelspec.title is Krea 2 Turbo")


def test_a_release_says_it_in_its_own_words_and_training_is_warned(family: Krea2, tmp_path: Path) -> None:
    for name, told in (("A-Turbo", False), ("B", True)):
        folder = write_dit(tmp_path / name, tiny_state(), "diffusers_sharded")
        (tmp_path / name / "model_index.json").write_text(
            json.dumps({"is_distilled": told}), encoding="utf-8"
        )
        one = replace(family, files=replace(family.files, dit=folder))
        assert one.defaults.steps == (8 if told else 28)
        if told:
            assert "is Krea 2 Turbo" in str(one.few_steps_evidence())
    (tmp_path / "B" / "model_index.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="model_index.json cannot be read"):
        _ = one.defaults


def options_of(*words: str) -> Any:
    found: list[Any] = []
    files = ["--dit", "raw.safetensors", "--save_path", "out"]
    krea2_generate_image.main([*files, *words], lambda family, options: found.append(options))
    return found[0]


def test_the_words_of_the_known_tuner_are_read() -> None:
    size = ("--width", "832", "--height", "480")
    options = options_of("a cat", "--steps", "8", *size, "--num-images", "3", "--mu", "1.15")

    request = options.request
    assert (request.prompt, request.infer_steps, tuple(request.video_size)) == ("a cat", 8, (480, 832))
    assert options.num_videos == 3
    assert request.extras["mu"] == ("mu", 1.15)
    assert options_of("--prompt", "a cat", "--num_images", "2").num_videos == 2
    for given, asked, words in (
        (size, "64 64", "--width 832 --height 480 and --image_size 64 64 differ"),
        (("--width", "1024", "--height", "1024"), "64 64", "--width 1024 --height 1024 and .* 64 64 differ"),
        (("--width", "512"), "1024 1024", "--width 512 and --image_size 1024 1024 differ"),
        ((), "64 64", ""),
        (size, "480 832", ""),
    ):
        if words:
            with pytest.raises(OptionError, match=words):
                options_of("a cat", *given, "--image_size", *asked.split())
        else:
            found = options_of("a cat", *given, "--image_size", *asked.split()).request.video_size
            assert " ".join(map(str, found)) == asked
    assert tuple(options_of("a cat", "--width", "512").request.video_size) == (1024, 512)
    assert tuple(options_of("a cat").request.video_size) == (1024, 1024)


def test_noise_levels_that_are_said_twice_are_told(family: Krea2, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OptionError, match="--flow_shift and --mu --y2: each sets the noise levels by itself"):
        options_of("a cat", "--flow_shift", "3", "--mu", "1", "--y2", "1.15")
    options = options_of("a cat", "--mu", "1.15", "--y1", "0.5")
    assert prepare_line(family, options, {}).flow_shift == pytest.approx(math.exp(1.15))
    assert "--y1 is ignored because --mu 1.15 fixes the noise levels" in caplog.text


@pytest.mark.parametrize(
    ("typed", "line", "shift"),
    [
        ("--flow_shift 3", "--mu 0.5", math.exp(0.5)),
        ("--flow_shift 3", "--y1 1 --y2 1", math.exp(1)),
        ("--mu 0.5", "--y1 1 --y2 1", math.exp(1)),
        ("--y1 1 --y2 1", "--mu 0.5", math.exp(0.5)),
        ("--mu 0.5", "--fs 3", 3),
        ("--y1 2 --y2 2", "--flow_shift 3", 3),
        ("--y1 1", "--y2 1", math.exp(1)),
    ],
)
def test_a_line_replaces_what_the_command_says_of_noise_levels(
    family: Krea2, caplog: pytest.LogCaptureFixture, typed: str, line: str, shift: float
) -> None:
    options = options_of("a cat", *typed.split())
    prepared = prepare_line(family, options, parse_generation_line(f"a dog {line}", options.line_options))
    assert prepared.flow_shift == pytest.approx(shift)
    assert "ignored" not in caplog.text


def test_a_prompt_line_has_noise_levels_and_makes_one_picture(family: Krea2) -> None:
    options = options_of("a cat")
    line = parse_generation_line("a dog --mu 0.3 --y1 1 --g 2 --i 1", options.line_options)
    prepared = prepare_line(family, options, line)

    assert (prepared.flow_shift, prepared.guidance_scale) == (pytest.approx(math.exp(0.3)), (2.0,))
    with pytest.raises(OptionError, match="--i: a line generates one image, not 3"):
        parse_generation_line("a dog --i 3", options.line_options)


def test_states_of_another_encoder_are_refused_with_what_to_do(family: Krea2) -> None:
    latents = torch.zeros(1, 16, 1, 4, 4)

    def conditions(*shape: int) -> Any:
        given: dict[str, Any] = {"latents": latents, "krea2_vl_embed": [torch.zeros(shape)]}
        return family.batch_conditions(latents, Batch(given, ("a cat",), ("a.png",)))

    assert conditions(3, 12, CONFIG.text_dim)["krea2_vl_embed"][0].shape == (3, 12, CONFIG.text_dim)
    for shape, words in (
        ((3, 12, 8), "has width 8"),
        ((3, 4, 64), "is 3x4x64, not 12"),
        ((3, 64), "is 3x64"),
    ):
        with pytest.raises(CacheError, match=f"{words}.*krea2_cache_text_encoder_outputs.py"):
            conditions(*shape)


@pytest.mark.parametrize("dialect", ["safetensors", "diffusers_sharded"])
@pytest.mark.parametrize("start", ["txtfusion.refiner_blocks.1.", "txtfusion.layerwise_blocks.1."])
def test_a_file_without_blocks_of_the_texts_is_not_taken_for_a_smaller_model(
    tmp_path: Path, dialect: str, start: str
) -> None:
    state = {name: tensor for name, tensor in tiny_state().items() if not name.startswith(start)}
    path = write_dit(tmp_path, state, dialect)
    with pytest.raises(CheckpointError, match="1 of 2 blocks of txtfusion.*Pass the complete file"):
        Krea2Files(path).dit_header()


def test_the_release_has_28_blocks(tmp_path: Path) -> None:
    tensors = tensor_list("krea2-dit")
    full = write_hollow(tmp_path / "whole.safetensors", tensors)
    assert Krea2Files(full).dit_header().config.num_layers == 28
    cut = {name: one for name, one in tensors.items() if not name.startswith("blocks.27.")}
    with pytest.raises(CheckpointError, match="only 27 of 28 blocks of blocks exist"):
        Krea2Files(write_hollow(tmp_path / "cut.safetensors", cut)).dit_header()


def test_raw_without_guidance_is_warned_of(
    family: Krea2, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = replace(family, files=replace(family.files, dit=write_dit(tmp_path, tiny_state(), name="raw")))
    prepare(raw)
    prepare(family, guidance_scale=1.0)  # its name says nothing
    assert not caplog.text
    prepare(raw, guidance_scale=1.0)
    assert "raw.safetensors is raw, whose images are blurred without guidance" in caplog.text


def test_tensors_of_the_first_days_are_left_out(tmp_path: Path) -> None:
    more = {f"last.{name}.weight": torch.zeros(8, 64) for name in ("down", "up")}
    path = write_dit(tmp_path, {**tiny_state(), **more})

    assert not more.keys() & load_dit(path, CPU).state_dict().keys()
    save_file({**load_file(path), "last.over.weight": torch.zeros(8)}, path)
    with pytest.raises(CheckpointError, match="last.over.weight"):
        load_dit(path, CPU)
