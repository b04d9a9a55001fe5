"""From a request to latents: the loop against recorded runs, and latent previews in all families."""

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fpack_generate_video
import wan_generate_video
from frame_pack.generating import video_sections
from frame_pack.sections import ANTI_DRIFTING, F1, GenerationOrder
from generation.denoise import make_latents
from generation.run import generate
from modules.errors import CheckpointError, OptionError
from modules.media.reading import video_info
from protocols.data import LatentSpec
from protocols.requests import Request
from protocols.steps import CompletedStep, EncodedPrompts
from tests.generation.guided import Script
from tests.generation.test_run import options
from tests.generation.toy_family import ToyDit, ToyFamily
from tests.golden_cases import DRAWN, make_weights, read_case
from tests.preparing import prepare
from tests.tiny.framepack import write_tiny_framepack
from tests.tiny.project import write_image
from tests.tiny.taehv import write_taehv
from tests.tiny.wan import write_tiny_wan
from wan.configs import TASKS, WanConfig
from wan.family import Wan, WanFiles
from wan.model import WanModel

MP4, PNG = "latent_preview.mp4", "latent_preview.png"
COLORED = LatentSpec(
    channels=2,
    stride=(4, 8, 8),
    pixel_step=16,
    frame_step=4,
    preview_factors=((1.0, 0.5, 0.0), (0.0, 0.5, 1.0)),
)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Script]:
    folder = tmp_path_factory.mktemp("models")
    write_image(folder / "start.png", 48, 32)
    size = ("--video_size", "32", "48", "--infer_steps", "2")
    wan = ("--task", "t2v-1.3B", *write_tiny_wan(folder / "wan").models, "--video_length", "5")
    sections = ("--image_path", folder / "start.png", "--video_sections", "3")
    framepack = write_tiny_framepack(folder / "framepack").models
    return {
        "wan": Script(wan_generate_video.main, (*wan, *size)),
        "framepack": Script(fpack_generate_video.main, (*framepack, *size, *sections)),
    }


@pytest.fixture(scope="module")
def taehv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_taehv(tmp_path_factory.mktemp("taehv") / "taehv.safetensors")


SHAPES = {  # frames and rate of the preview by colors, frames and rate by TAEHV
    "wan": (2, 4.0, 5, 16.0),
    "framepack": (18, 7.5, 69, 30.0),
}


@pytest.mark.slow_cases("framepack")
@pytest.mark.parametrize("family", SHAPES)
def test_latents_are_the_same_bits_with_previews_in_every_family(
    tmp_path: Path, scripts: dict[str, Script], taehv: Path, family: str
) -> None:
    script, say = scripts[family], ("--prompt", "a cat", "--seed", 3, "--output_type", "latent")
    frames, rate, all_frames, full_rate = SHAPES[family]

    plain = script.one(tmp_path / "plain", *say)
    colored = script.one(tmp_path / "coloured", *say, "--preview_latent_every", 1)
    decoded = script.one(tmp_path / "decoded", *say, "--preview_latent_every", 1, "--preview_vae", taehv)

    assert torch.equal(plain, colored)
    assert torch.equal(plain, decoded)
    assert not list((tmp_path / "plain").glob("latent_preview*"))
    for folder, expected in (("coloured", (frames, rate)), ("decoded", (all_frames, full_rate))):
        info = video_info(tmp_path / folder / MP4)
        assert (info.width, info.height) == (48, 32)
        assert (info.frames, info.fps) == expected


@pytest.mark.parametrize("order", [ANTI_DRIFTING, F1], ids=["anti-drifting", "f1"])
def test_what_is_shown_of_sections_is_the_part_of_the_video_that_is_finished(order: GenerationOrder) -> None:
    generator, window = torch.Generator().manual_seed(1), 2

    class Noise:
        def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

    inputs: dict[int, Any] = {
        index: {"start_latents": torch.full((1, 2, 1, 2, 2), 9.0), "image_embeddings": torch.zeros(1, 1, 1)}
        for index in range(3)
    }
    prompts = {index: EncodedPrompts({}) for index in range(3)}
    sections = video_sections(prompts, inputs, Noise(), torch.ones(1), order, window, ())
    so_far, section = [], next(sections)
    try:
        while True:
            so_far.append(None if section.previous_piece is None else section.previous_piece.previous_latents)
            assert section.count == 3
            section = sections.send(section.noise)
    except StopIteration as end:
        video = end.value
    assert so_far[0] is None
    for made, part in enumerate(so_far[1:], 1):
        assert part is not None
        full = video[:, :, -made * window :] if order.prepends_sections else video[:, :, : made * window + 1]
        assert torch.equal(part, full)


def toy(**more: Any) -> ToyFamily:
    return ToyFamily(latent=COLORED, **more)


def test_a_folder_in_the_way_is_one_warning_for_all_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out" / MP4 / "x").mkdir(parents=True)
    (tmp_path / "lines.txt").write_text("cat --d 1\ndog --d 2\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        words = ("--from_file", tmp_path / "lines.txt", "--preview_latent_every", 1)
        generate(toy(), options(tmp_path / "out", *words))
    assert caplog.text.count("A latent preview has failed") == 1
    assert len([path for path in (tmp_path / "out").glob("*.mp4") if path.is_file()]) == 2


def test_a_wrong_file_is_an_error_before_anything_loads(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no model", encoding="utf-8")
    family = toy()
    words = ("--prompt", "cat", "--preview_latent_every", 1, "--preview_vae")
    with pytest.raises(CheckpointError, match=r"text.pth"):
        generate(family, options(tmp_path, *words, tmp_path / "text.pth"))
    other = write_taehv(tmp_path / "taehv.pth")
    with pytest.raises(CheckpointError, match=r"decodes 16 channels .*\n?.* 2 channels"):
        generate(family, options(tmp_path, *words, other))
    with pytest.raises(OptionError, match="no map from this model's latents to colors"):
        generate(ToyFamily(diary=family.diary), options(tmp_path, *words[:-1]))
    assert family.diary == []


CPU = torch.device("cpu")
REQUEST = prepare(Request("p", 3, 32, 32, 5, 4, 5.0, None, 3.0, "unipc", 16.0))


def toy_texts(positive: float = 3, negative: float | None = 8) -> dict[int, EncodedPrompts]:
    def letters(value: float) -> dict[str, Tensor | list[Tensor]]:
        return {"letters": [torch.full((1, 1), float(value))]}

    return {0: EncodedPrompts(letters(positive), None if negative is None else letters(negative))}


def note(noted: list[Any], what: object) -> bool:
    """Watch a step without ending the loop."""
    noted.append(what)
    return False


def golden_wan() -> WanModel:
    description, _ = read_case("wan_dit_t2v")
    names = {field.name for field in fields(WanConfig)}
    config = WanConfig(**{key: value for key, value in description["config"].items() if key in names})
    model = WanModel(config)
    model.load_state_dict(make_weights(description["weights_model_key"], description["weights"]))
    return model.eval()


@pytest.mark.parametrize(
    ("solver", "recorded"),
    [("unipc", "latent_unipc"), ("dpm++", "latent_dpmpp"), ("euler", "latent_vanilla")],
)
def test_a_whole_wan_run_equals_the_recorded_one(solver: str, recorded: str) -> None:
    description, tensors = read_case("wan_sampling")
    _, _, latent_frames, rows, columns = (1, *tensors["noise"].shape)
    request = Request(
        "p",
        description["seed"],
        width=columns * 8,
        height=rows * 8,
        frames=(latent_frames - 1) * 4 + 1,
        steps=description["steps"],
        guidance_scale=description["guidance_scale"],
        flow_shift=description["flow_shift"],
        solver=solver,
    )
    texts = {0: EncodedPrompts({"t5": [tensors["context"]]}, {"t5": [tensors["context_null"]]})}
    family, dit = Wan(WanFiles(task=TASKS["t2v-1.3B"])), golden_wan()
    starts: list[Tensor] = []

    latents = make_latents(
        family,
        lambda timestep: dit,
        prepare(request),
        texts,
        {0: {}},
        CPU,
        cpu_noise=True,
        watchers=[lambda done: note(starts, done.step.noisy)],
    )

    torch.testing.assert_close(starts[0][0], tensors["noise"], atol=DRAWN, rtol=0)
    torch.testing.assert_close(latents[0], tensors[recorded], atol=2e-3, rtol=2e-3)


def test_a_watcher_that_has_enough_makes_the_clean_estimate_the_result() -> None:
    family, told, estimates = ToyFamily(), list[int](), list[Tensor]()

    def enough(done: CompletedStep) -> bool:
        estimates.append(done.clean)
        return done.step.index == 1

    def count(done: CompletedStep) -> bool:
        assert done.step.num_steps == 4
        return note(told, done.step.index)

    latents = make_latents(
        family, lambda t: ToyDit(), REQUEST, toy_texts(), {0: {}}, CPU, watchers=[enough, count]
    )

    assert torch.equal(latents, estimates[-1])
    assert not latents.requires_grad
    assert told == [0, 1]  # also of the last one, by which another has ended the loop
    assert len(family.diary) == 2 * 2  # passes: no step more
