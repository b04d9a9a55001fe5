"""Training LTX-2 on clips of which parts are given: steps equal those computed with diffusers.

Given latents are clean, have the time 0, and are out of the loss, which is a mean over the others.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as functional
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dataset.sources.frames import shrink_mask
from ltx_2.configs import LATENT
from ltx_2.given import (
    CleanFrameRule,
    CleanLatentRules,
    ClipEndRule,
    KeyframeRule,
    MaskRule,
    audio_latent_times,
    covered_fractions,
)
from ltx_2.given_options import CONDITION_OPTIONS, Ltx2GivenParts
from ltx_2.options import Ltx2TrainingOptions, apply_conditioning_config
from modules.errors import DatasetError, OptionError
from protocols.data import AUDIO_LATENTS, Batch
from tests.commands import ROOT
from tests.ltx_2.release import dit_config
from tests.ltx_2.test_model import in_diffusers
from tests.ltx_2.test_options import read_own
from tests.ltx_2.test_training import ATTENTION, RATE, Heard, Project, read_items, told, write_project
from tests.ltx_2.tiny_dit import dit_diffusers_state, dit_in_diffusers
from tests.parity.training import (
    SEED,
    Factors,
    assert_steps_of_descent,
    descent,
    learning,
    noise_of,
    shuffled,
    stream,
    uniform_of,
)

FRAMES, ROWS, COLUMNS = 3, 2, 2  # latents of 17 frames of 64 x 64 pixels
TABLE = 'spatial_crop_region = [0, 32, 64, 64]\nmask_directory = "{0}/masks"\n'
TABLE += 'audio_cond_mask_directory = "{0}/times"'


@dataclass(frozen=True)
class Shares:
    """How much of each latent of a clip is given, 0 to 1."""

    image: Tensor  # F H W
    audio: Tensor  # T
    keyframes: tuple[int, ...] = ()  # latent frames that are shown besides
    guides: tuple["Guided", ...] = ()  # images that are shown before these


@dataclass(frozen=True)
class Guided:
    """An image that is shown besides a clip."""

    latents: Tensor  # C 1 H W
    frame: int  # where it stands
    share: float  # how much of it is given
    noise: Tensor


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three clips of 17 frames, two with audio; masks whose upper half is white; times of their audio."""
    folder = tmp_path_factory.mktemp("größe 3")
    (folder / "masks").mkdir()
    (folder / "times").mkdir()
    for name in "abc":
        mask = numpy.zeros((48, 48), numpy.uint8)
        mask[:24] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    (folder / "times" / "a.txt").write_text("0.2 0.4\n", encoding="utf-8")
    (folder / "times" / "b.json").write_text('{"intervals": [[0.2, 0.4]]}', encoding="utf-8")
    (folder / "times" / "c.txt").write_text("", encoding="utf-8")
    return write_project(folder, frames=17, more=TABLE.format(folder.as_posix()))


def coordinates(dit: Any, item: Heard, keyframes: Sequence[int]) -> Tensor:
    """Where tokens of the video and of keyframes at these frames begin and end, in seconds and pixels."""
    sizes = {
        "batch_size": 1,
        "height": ROWS,
        "width": COLUMNS,
        "device": torch.device("cpu"),
        "fps": item.fps,
    }
    found: Tensor = dit.rope.prepare_video_coords(num_frames=FRAMES, **sizes)
    parts = [found]
    for frame in keyframes:
        one = dit.rope.prepare_video_coords(num_frames=1, **sizes)
        one[:, 0] = torch.tensor([frame, frame + 1]) / item.fps
        parts.append(one)
    return torch.cat(parts, dim=2)


def losses(dit: Any, batch: Sequence[Heard], step: int, given: Sequence[Shares]) -> tuple[Tensor, Tensor]:
    """The losses of images and of audio, by the released trainer's formulas."""
    sigmas, noise = uniform_of(batch, step).float(), noise_of(batch, step)
    (shape,) = {one.audio.shape for one in batch if one.audio is not None}
    of_audio = torch.randn(len(batch), *shape, generator=stream(SEED, "sound", step))
    found = []
    for place, (item, shares) in enumerate(zip(batch, given, strict=True)):
        clean = item.latents, torch.zeros(shape) if item.audio is None else item.audio
        drawn, levels = (noise[place], of_audio[place]), (shares.image, shares.audio[:, None])
        sigma = sigmas[place]
        mixed, times = [], []
        for one, other, share in zip(clean, drawn, levels, strict=True):
            level = (1 - share) * sigma
            mixed.append((1 - level) * one + level * other)
            times.append(1000 * level.flatten()[None])
        for guide in shares.guides:
            level = (1 - guide.share) * sigma
            mixed[0] = torch.cat([mixed[0], (1 - level) * guide.latents + level * guide.noise], dim=1)
            times[0] = functional.pad(times[0], (0, guide.latents[0].numel()), value=float(1000 * level))
        shown = item.latents[:, list(shares.keyframes)]
        mixed[0] = torch.cat([mixed[0], shown], dim=1)
        times[0] = functional.pad(times[0], (0, shown[0].numel()))
        frames = [guide.frame for guide in shares.guides] + [8 * index for index in shares.keyframes]
        time = 1000 * sigma.view(1)
        inputs = {
            **{"noisy": mixed[0][None], "audio": mixed[1][None], "timesteps": time, "audio_timesteps": time},
            **{"text": item.text[None], "audio_text": item.audio_text[None], "fps": item.fps},
        }
        gates = dit.av_cross_attn_video_a2v_gate, dit.av_cross_attn_audio_v2a_gate
        hooks = [gate.register_forward_pre_hook(lambda *_, time=time: (time,)) for gate in gates]
        made = in_diffusers(
            dit,
            inputs,
            timestep=times[0],
            audio_timestep=times[1],
            isolate_modalities=item.audio is None,
            video_coords=coordinates(dit, item, frames),
        )
        made = made[0][:, :, :FRAMES], made[1]
        for hook in hooks:
            hook.remove()
        errors = []
        for one, other, full, share in zip(made, drawn, clean, levels, strict=True):
            error = (one[0] - (other - full)).square()
            errors.append(error[:, (share == 0).expand(error.shape[1:])].mean())
        found.append(torch.stack([errors[0], errors[1] * (item.audio is not None)]))
    image, heard = torch.stack(found).mean(0)
    return image, heard


Draw = Callable[[int, Sequence[Heard], int], list[Shares]]  # step, batch, latents of audio


def check_steps(
    project: Project, draw: Draw, *words: object, items: Sequence[Heard] | None = None
) -> list[Shares]:
    """Compare a training with steps computed with diffusers. Returns what was given of each clip.

    items: clips that are learned; None: those of the caches.
    """
    project.train(*descent(RATE), *words)

    there = project.release.networks
    items, state = items or read_items(project.folder / "cache"), there["state"]
    length = next(one.audio.shape[1] for one in items if one.audio is not None)
    paths = [name.removesuffix(".weight") for name in state if ATTENTION.search(name)]
    parts = {  # its name there
        path.replace(".", "_"): [name.removesuffix(".weight")]
        for path in paths
        for name in dit_diffusers_state({f"{path}.weight": state[f"{path}.weight"]})
    }
    expected, drawn = [], []

    def gradients(factors: Factors, step: int) -> Factors:
        dit = dit_in_diffusers(there["version"], state, config=dit_config(there["version"]))
        batch = shuffled(items, step)
        given = draw(step, batch, length)
        drawn.extend(given)
        with learning(dit, parts, factors) as found:
            both = losses(dit, batch, step, given)
            sum(both).backward()
        expected.append([float(one.detach()) for one in both])
        return found()

    assert_steps_of_descent(project.folder / "out", parts, RATE, gradients, "LTX-2")
    measured = torch.tensor([list(row.values()) for row in told(project)])
    torch.testing.assert_close(measured, torch.tensor(expected), atol=0, rtol=1e-4)
    return drawn


def test_steps_equal_those_computed_with_diffusers(project: Project) -> None:
    """With prefix, rectangle, mask, and both kinds of parts of the audio, drawn for each clip."""
    words = ["--ltx2_extend_prefix_frames", 1, "--ltx2_extend_suffix_frames", 1]
    words += ["--ltx2_extend_prefix_p", 0.5]
    words += ["--ltx2_extend_suffix_p", 0.3, "--ltx2_spatial_crop", "--ltx2_spatial_crop_p", 0.5]
    words += ["--ltx2_inpaint_mask", "--ltx2_inpaint_mask_p", 0.4, "--ltx2_audio_extend_prefix_frames", 3]
    words += ["--ltx2_audio_extend_p", 0.5, "--ltx2_audio_inpaint_mask", "--ltx2_audio_inpaint_mask_p", 0.7]

    def draw(step: int, batch: Sequence[Heard], length: int) -> list[Shares]:
        numbers = torch.rand((8, 3), generator=stream(SEED, "given tokens", step))
        centers = torch.arange(length) * 0.04 - 0.01  # all but the first cover 0.04 s
        middle = (centers >= 0.2) & (centers < 0.4)
        made = []
        for place, item in enumerate(batch):
            image, audio = torch.zeros(FRAMES, ROWS, COLUMNS), torch.zeros(length)
            image[0] = max(image[0].max(), float(numbers[0, place] < 0.5))
            image[-1] = max(image[-1].max(), float(numbers[1, place] < 0.3))
            image[..., 1] = image[..., 1].maximum((numbers[2, place] < 0.5).float())
            image[:, 0] = image[:, 0].maximum((numbers[3, place] < 0.4).float())
            audio[:3] = float(numbers[5, place] < 0.5)
            if item.audio is not None:
                audio = audio.maximum(middle * (numbers[7, place] < 0.7).float())
            made.append(Shares(image, audio))
        return made

    drawn = check_steps(project, draw, *words)

    assert {0.0, 1.0} <= {float(one.image.mean().ceil()) for one in drawn}  # with and without


@pytest.mark.slow
def test_steps_with_keyframes_equal_those_computed_with_diffusers(project: Project) -> None:
    words = ["--keyframe_endpoint_training", "--keyframe_first_frame_p", 0.6, "--keyframe_last_frame_p", 0.6]
    words += ["--keyframe_random_interior_p", 0.5, "--keyframe_max_random_interior", 4]
    words += ["--ltx2_inpaint_mask"]  # so that masks do not weight the loss

    def draw(step: int, batch: Sequence[Heard], length: int) -> list[Shares]:
        generator = stream(SEED, "given tokens", step)
        torch.rand((8, 3), generator=generator)  # of other parts
        numbers = torch.rand((3, 3), generator=generator)
        torch.rand(1, generator=generator)  # how many are between the ends: there is one
        torch.randperm(1, generator=generator)
        chances = torch.tensor([0.6, 0.5, 0.6])[:, None]  # by latent frame
        sees = numbers[[0, 2, 1]] < chances
        shown = [index for index in range(FRAMES) if sees[index].any()]
        shape = (len(batch), len(batch[0].latents), len(shown), ROWS, COLUMNS)
        noise = torch.randn(shape, generator=generator) if not sees[shown].all() else torch.zeros(shape)
        made = []
        for place in range(len(batch)):
            chosen = tuple(index for index in shown if sees[index, place])
            # a clip that does not see one has noise in its place, at the time of the clip
            hidden = tuple(
                Guided(noise[place, :, [number]], 8 * index, 0, noise[place, :, [number]])
                for number, index in enumerate(shown)
                if not sees[index, place]
            )
            made.append(Shares(torch.zeros(FRAMES, ROWS, COLUMNS), torch.zeros(length), chosen, hidden))
        return made

    drawn = check_steps(project, draw, *words)

    assert {one.keyframes for one in drawn} == {(), (0,), (1,), (1, 2)}
    assert any(one.guides for one in drawn)


@pytest.mark.slow
def test_a_training_that_is_resumed_draws_the_same_parts(project: Project) -> None:
    """Continued after two of four steps, it ends with the same weights, bit for bit."""
    words = ["--ltx2_extend_prefix_frames", 1, "--ltx2_extend_p", 0.5, "--ltx2_spatial_crop"]
    words += ["--ltx2_spatial_crop_p", 0.5, "--ltx2_inpaint_mask", "--ltx2_inpaint_mask_p", 0.5]
    words += ["--video_anchor_training", "--video_anchor_strategy", "random", "--video_anchor_strength", 0.5]
    words += [
        "--ltx2_graded_conditioning",
        "--ltx2_audio_extend_prefix_frames",
        3,
        "--ltx2_audio_extend_p",
        0.5,
    ]
    words += ["--ltx2_audio_inpaint_mask", "--ltx2_audio_inpaint_mask_p", 0.5, "--keyframe_endpoint_training"]
    words += ["--keyframe_first_frame_p", 0.5, "--keyframe_random_interior_p", 0.5]
    words += ["--keyframe_max_random_interior", 1, *descent(RATE, steps=4), "--save_state"]

    project.train(*words, "--output_dir", "whole")
    state = project.folder / "whole" / "lora-step00000002-state"
    project.train(*words, "--output_dir", "resumed", "--resume", state)

    whole, resumed = (load_file(project.folder / name / "lora.safetensors") for name in ("whole", "resumed"))
    early = load_file(project.folder / "whole" / "lora-step00000002.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(one, resumed[name]) for name, one in whole.items())
    assert any(not torch.equal(one, early[name]) for name, one in whole.items())


def test_keyframes_are_ends_and_random_frames_between_them() -> None:
    batch = batch_of(6)
    rules = CleanLatentRules(keyframes=KeyframeRule(0.7, 0.7, 0.7, 3))
    drawn = [rules.draw(batch, torch.Generator().manual_seed(seed)) for seed in range(200)]
    always = rules.always().draw(batch, torch.Generator())

    seen = []  # of each clip: the frames of its keyframes
    for one in drawn:
        shares = (
            torch.zeros(2, 0) if one is None or one.keyframe_strengths is None else one.keyframe_strengths
        )
        places = () if one is None else one.keyframe_indices
        assert list(places) == sorted({*places})
        assert shares.sum(0).all()  # each is seen by a clip
        assert {*shares.unique().tolist()} <= {0, 1000}
        assert one is None or (one.keyframe_noise is None) == bool(shares.all())
        seen += [{place for place, share in zip(places, row, strict=True) if share} for row in shares]
    assert None in drawn
    assert all(place in (0, 8, 16, 24, 32, 40) for places in seen for place in places)
    assert {len(places - {0, 40}) for places in seen} == {0, 1, 2, 3}
    assert {(0 in places, 40 in places) for places in seen} == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }
    assert any(one != two for one, two in zip(seen[::2], seen[1::2], strict=True))
    assert always is not None
    assert {0, 40} < set(always.keyframe_indices)
    assert always.keyframes is not None
    assert always.keyframes.shape == (2, 8, len(always.keyframe_indices), 2, 3)
    assert rules.draw(batch_of(1), torch.Generator().manual_seed(1)) is None  # a single image


def batch_of(frames: int = 4, rows: int = 2, columns: int = 3, length: int = 0, **more: Any) -> Batch:
    tensors = {"latents": torch.zeros(2, 8, frames, rows, columns)}
    if length:
        tensors[AUDIO_LATENTS] = torch.zeros(2, 8, length, 16)
    return Batch({**tensors, **more.pop("tensors", {})}, ("",) * 2, ("a", "b"), **more)


def draw_image(rules: CleanLatentRules, batch: Batch, seed: int = 0) -> Tensor:
    given = rules.draw(batch, torch.Generator().manual_seed(seed))
    assert given is not None
    assert given.image is not None
    return given.image[:, 0] / 1000


@pytest.mark.parametrize(
    ("strategy", "count", "is_end", "between"),
    [("endpoints", 3, True, 0), ("endpoints_random", 1, True, 1), ("random", 2, None, None)],
)
def test_anchors_are_ends_or_random_frames_with_their_strength(
    strategy: str, count: int, is_end: bool | None, between: int | None
) -> None:
    found = draw_image(CleanLatentRules(frames=CleanFrameRule(1, strategy, count, 0.7)), batch_of(6))

    assert found.unique().tolist() == pytest.approx([0, 0.7])
    frames = found[:, :, 0, 0] > 0
    assert torch.equal(frames[:, :, None, None].expand_as(found), found > 0)
    if between is None:
        assert frames.sum(1).tolist() == [count] * 2
        return
    assert frames[:, [0, -1]].all() == is_end
    assert frames[:, 1:-1].sum(1).tolist() == [between] * 2


def test_one_draw_is_for_both_ends_unless_one_has_its_own() -> None:
    both = [
        draw_image(CleanLatentRules(ends=ClipEndRule(1, 1, 0.5, 0.5, True)), batch_of(), seed)
        for seed in (0, 1, 2)
    ]
    apart = [
        draw_image(CleanLatentRules(ends=ClipEndRule(1, 1, 0.5, 0.5, False)), batch_of(), seed)
        for seed in (0, 2)
    ]

    assert all(torch.equal(one[:, 0], one[:, -1]) for one in both)
    assert any(not torch.equal(one[:, 0], one[:, -1]) for one in apart)


@pytest.mark.parametrize(
    ("rules", "more", "words"),
    [
        (
            CleanLatentRules(ends=ClipEndRule(2, 2, 1, 1, True)),
            {},
            "a has 4 latent frames, and 2 at its start",
        ),
        (CleanLatentRules(region=MaskRule(1, False)), {}, "needs spatial_crop_region"),
        (
            CleanLatentRules(region=MaskRule(1, False)),
            {"crop_regions": ((0, 0, 31, 96),) * 2},
            "covers none of its",
        ),
        (
            CleanLatentRules(region=MaskRule(1, False)),
            {"crop_regions": ((0, 0, 64, 96),) * 2},
            "covers all of its",
        ),
        (CleanLatentRules(mask=MaskRule(1, False)), {}, "needs masks"),
        (
            CleanLatentRules(mask=MaskRule(1, False)),
            {"tensors": {"given_mask": torch.ones(2, 4, 2, 3)}},
            "a: its mask keeps the whole clip",
        ),
        (CleanLatentRules(audio_intervals=MaskRule(1, False)), {"length": 9}, "needs a file of its name"),
        (CleanLatentRules(audio_ends=ClipEndRule(9, 0, 1, 1, True)), {"length": 9}, "9 latents of audio"),
    ],
)
def test_what_leaves_nothing_to_learn_or_is_missing_is_refused(
    rules: CleanLatentRules, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(DatasetError, match=re.escape(words)):
        rules.draw(batch_of(**more), torch.Generator())


def test_a_single_image_has_no_ends_and_clips_without_audio_no_times() -> None:
    rules = CleanLatentRules(ends=ClipEndRule(1, 1, 1, 1, True), audio_intervals=MaskRule(1, False))

    assert rules.draw(batch_of(1), torch.Generator()) is None


def test_times_cover_latents_by_the_seconds_of_each() -> None:
    starts, ends = audio_latent_times(4)

    assert starts.tolist() == pytest.approx([0, 0.01, 0.05, 0.09])
    assert covered_fractions(starts, ends, [(0.03, 0.06)]).tolist() == pytest.approx(
        [0, 0.5, 0.25, 0], abs=1e-6
    )


RECIPE = """
[video]
is_generated = true
[[video.conditions]]
type = "first_frame"
p = 0.25
[[video.conditions]]
type = "extend"
prefix = 2
suffix_p = 0.5
[[video.conditions]]
type = "inpaint"
probability = 0.4
threshold = 0.3
invert = true
[audio]
is_generated = false
"""


def options_with(folder: Path, recipe: str, *words: str) -> Ltx2TrainingOptions:
    path = folder / "recipe.toml"
    path.write_text(recipe, encoding="utf-8")
    words = "--ltx2_mode", "av", "--ltx2_conditioning_config", str(path), *words
    options: Ltx2TrainingOptions = read_own("ltx2_train_network", *words)
    return apply_conditioning_config(options)


def test_the_recipe_of_the_guide_is_read_and_its_table_names_every_type(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "ltx2.md").read_text(encoding="utf-8")
    recipe, _, after = guide.partition("```toml\n# given.toml\n[video]")[2].partition("```")

    given = options_with(tmp_path, f"[video]{recipe}").given

    assert (given.ltx2_extend_prefix_frames, given.ltx2_extend_p) == (8, 0.5)
    assert (given.ltx2_audio_inpaint_mask, given.ltx2_audio_inpaint_mask_p) == (True, 1.0)
    table = after.partition("All have")[0]
    for (one, kind), names in CONDITION_OPTIONS.items():
        row = next(line for line in table.splitlines() if f"`{kind}`" in line)
        assert one in row or "both" in row
        assert all(f"`{key}`" in row for key in names if key not in ("", "probability"))


def test_a_recipe_sets_the_options(tmp_path: Path) -> None:
    options = options_with(tmp_path, RECIPE)

    expected = Ltx2GivenParts.from_defaults(
        ltx2_extend_prefix_frames=2,
        ltx2_extend_suffix_p=0.5,
        ltx2_inpaint_mask=True,
        ltx2_inpaint_mask_p=0.4,
        ltx2_inpaint_mask_threshold=0.3,
        ltx2_inpaint_mask_invert=True,
        ltx2_extend_p=1.0,
    )
    assert options.given == expected
    assert (options.first_frame_probability, options.ltx2_train_direction) == (0.25, "a2v")


@pytest.mark.parametrize(
    ("change", "typed", "words"),
    [
        (
            ("prefix = 2", "prefix = 2"),
            ("--ltx2_extend_prefix_frames", "3"),
            "--ltx2_extend_prefix_frames 3 and",
        ),
        (("p = 0.25", "p = 0.25\nprobability = 0.25"), (), "p and probability mean the same"),
        (("p = 0.25", "p = 2"), (), "2 is not a value of --ltx2_first_frame_conditioning_p"),
        (("prefix = 2", "prefixes = 2"), (), "unknown key 'prefixes'"),
        (
            ("[video]\n", "ltx2_extend_prefix_frames = 2\n[video]\n"),
            (),
            "unknown key 'ltx2_extend_prefix_frames'. Keys are audio, video. It has a table for each stream "
            "of --ltx2_mode, [video], [audio], with is_generated and conditions: docs/ltx2.md",
        ),
        (('"extend"', '"expand"'), (), "type 'expand' is not known here, only first_frame"),
        (("is_generated = true", "is_generated = false"), (), "nothing would be learned"),
        (("[audio]\nis_generated = false", ""), (), "[audio] and --ltx2_mode do not match"),
        (("[video]", "[video"), (), "cannot be read"),
    ],
)
def test_a_recipe_that_is_wrong_or_contradicts_an_option_is_refused(
    tmp_path: Path, change: tuple[str, str], typed: tuple[str, ...], words: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        options_with(tmp_path, RECIPE.replace(*change), *typed)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("av --ltx2_train_direction v2a --video_anchor_training", "the images are always clean"),
        ("av --ltx2_train_direction a2v --ltx2_audio_extend_prefix_frames 1", "the audio is always clean"),
        ("v --ltx2_audio_inpaint_mask", "given parts of the audio"),
        ("audio --ltx2_extend_suffix_frames 1", "given parts of images"),
        ("av --ltx2_train_direction v2a --keyframe_endpoint_training", "the images are always clean"),
        ("av --keyframe_endpoint_training --keyframe_random_interior_p 1", "pass both above 0"),
        (
            "av --keyframe_endpoint_training --keyframe_first_frame_p 0 --keyframe_last_frame_p 0",
            "there would be no keyframes",
        ),
        ("av --video_anchor_training --video_anchor_strength 0.5", "--ltx2_graded_conditioning"),
        ("av --video_anchor_training --video_anchor_strategy random --video_anchor_count 0", "1 or more"),
    ],
)
def test_parts_of_a_stream_that_is_given_or_not_there_are_refused(typed: str, words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        read_own("ltx2_train_network", "--ltx2_mode", *typed.split())


@pytest.mark.parametrize("is_inverted", [False, True])
def test_a_mask_that_moves_gives_a_latent_only_in_all_of_its_frames(is_inverted: bool) -> None:
    """By the means of caches; a still mask, and the first frame, are compared with the threshold alone."""
    frames = torch.zeros(17, 64, 96)
    frames[:, :, :32] = 1.0  # always
    frames[:12, :, 32:64] = 1.0  # in half of the last latent
    frames[:, :20, 64:] = 1.0  # its edge is in the middle of a latent, which stays
    if is_inverted:
        frames = 1 - frames
    means = shrink_mask((255 * frames).byte(), LATENT.stride)[None]

    given = MaskRule(1, is_inverted).find_clean(means)[0]

    per_frame = functional.avg_pool2d(frames, 32)
    inside = (per_frame > 0.5) != is_inverted
    exact = torch.cat([inside[:1], inside[1:].unflatten(0, (2, 8)).all(1)])
    assert not (given & ~exact).any()  # nothing that is made anew in any frame
    assert torch.equal(given[..., :2], exact[..., :2])
    assert given[0, 0].tolist() == [True, True, True]
    assert given[2, 0].tolist() == [True, False, False]
    still = MaskRule(1, is_inverted).find_clean(means[:, :1].expand(-1, 3, -1, -1))[0]
    assert torch.equal(still, inside[:1].expand(3, -1, -1))
