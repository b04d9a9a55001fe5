"""MagCache and TeaCache through the command lines of all families, on tiny models."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.messages import assert_one_message, run_here
from tests.tiny.families import family_called
from tests.tiny.project import write_clips
from tests.tiny.runs import Latents, TinyProject

STEPS = 8
SIZE = ("--video_size", "32", "32", "--infer_steps", str(STEPS), "--seed", "5", "--prompt", "a cat")
GUIDED = ("--guidance_scale", "3")
RATIOS = ("--magcache_mag_ratios", "1", *["0.99"] * (STEPS - 1))
# anything goes
BOLD = (*RATIOS, "--magcache_threshold", "100", "--magcache_k", "3")
TEA = ("--teacache_threshold", "100", "--teacache_coefficients", "1", "0")
SKIPPED = re.compile(r"(MagCache|TeaCache) skipped (\d+) of (\d+) passes")


def generate(project: TinyProject, output: Path, *words: object) -> tuple[Latents, str]:
    """Return the latents of what is made, and what was said."""
    latents = ("--output_type", "latent", "--save_path", output)
    said = project.run(*project.family.generate, *SIZE, *latents, *words)
    (path,) = output.glob("*.safetensors")
    return load_file(path), said


NAMES = (
    "wan t2v-1.3B",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            *(
                "hunyuan_video",
                "wan vace-1.3B",
                "framepack",
                "kontext",
                "flux_2",
                "flux_3",
                "qwen_image",
                "z_image",
            ),
            *("krea2", "krea2 edit", "qwen_image_21", "qwen_image_21 edit", "anima"),
            *("moss_image", "moss_image edit", "fibo_2", "fibo_2 edit", "ernie_image", "kandinsky"),
            *("hidream_o1", "hidream_o1 edit"),
            "hunyuan_video_15",
            "ideogram4",
            *("ltx_2", "ltx_2 with sound"),
        )
    ),
)


@pytest.fixture(scope="module", params=NAMES)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    family = family_called(request.param)
    folder = tmp_path_factory.mktemp("step cache")
    family.prepare(folder)
    return TinyProject(family, folder)


def skipped_in(said: str) -> tuple[int, int]:
    """How many passes were skipped, of how many."""
    found = SKIPPED.search(said)
    assert found is not None, said[-2000:]
    return int(found[2]), int(found[3])


def same_parts(ours: Latents, theirs: Latents) -> list[bool]:
    """Which of the parts, picture and sound, are equal."""
    assert ours.keys() == theirs.keys()
    assert all(one.isfinite().all() for one in ours.values())
    return [torch.equal(ours[name], theirs[name]) for name in ours]


def test_neutral_values_give_the_plain_bits_and_real_ones_skip(project: TinyProject, tmp_path: Path) -> None:
    plain, said = generate(project, tmp_path / "plain", *GUIDED)
    assert SKIPPED.search(said) is None
    for name, neutral in {
        "threshold": (*RATIOS, "--magcache_threshold", 0),
        "k": (*RATIOS, "--magcache_k", 0),
        "retention": (*BOLD, "--magcache_retention_ratio", 1),
        "tea": (*TEA, "--teacache_threshold", 0),
    }.items():
        assert all(same_parts(generate(project, tmp_path / name, *GUIDED, *neutral)[0], plain)), name
    for name, bold in {"mag": BOLD, "tea bold": TEA}.items():
        found, said = generate(project, tmp_path / name, *GUIDED, *bold)
        skipped, passes = skipped_in(said)
        assert 0 < skipped < passes
        assert passes % STEPS == 0
        assert not any(same_parts(found, plain))


def test_each_branch_of_guidance_skips_by_itself(tmp_path: Path, project: TinyProject) -> None:
    """Passes by the rule: of 8 steps, the first is kept (20 %), then three of four are skipped, and the last
    is computed.
    """
    sections = 2 if "framepack" in project.family.name else 1
    joined = project.family.name in {"hunyuan_video", "kontext", "flux_2", "flux_3"}
    own = {"ltx_2": 1, "ltx_2 with sound": 2}.get(project.family.name, 0)  # besides a prompt's weight
    off = 0 if project.family.name == "z_image" else 1  # whose scales count from 0
    for scale, branches in ((off, 1 + own), (3, 1 if joined else 2 + own)):
        _, said = generate(project, tmp_path / str(scale), "--guidance_scale", scale, *BOLD)
        # c s s s c s s c
        assert skipped_in(said) == (5 * branches * sections, STEPS * branches * sections)


def test_what_calibration_prints_can_be_given(project: TinyProject, tmp_path: Path) -> None:
    plain, _ = generate(project, tmp_path / "plain", *GUIDED)
    measured, said = generate(project, tmp_path / "measured", *GUIDED, "--magcache_calibration")
    assert all(same_parts(measured, plain))
    line = next(line for line in said.splitlines() if "--magcache_mag_ratios" in line)
    option, first, *others = line.split()
    assert first == "1.00000"
    assert len(others) == STEPS - 1
    assert all(re.fullmatch(r"\d+\.\d{5}", ratio) for ratio in others)
    assert len({*others}) > 1
    _, said = generate(project, tmp_path / "mag", *GUIDED, option, first, *others, "--magcache_threshold", 9)
    assert skipped_in(said)[0] > 0

    measured, said = generate(project, tmp_path / "tea measured", *GUIDED, "--teacache_calibration")
    assert all(same_parts(measured, plain))
    line = next(line for line in said.splitlines() if "--teacache_coefficients" in line)
    _, said = generate(project, tmp_path / "tea", *GUIDED, *line.split(), "--teacache_threshold", 9)
    assert skipped_in(said)[0] > 0


def test_a_video_that_starts_from_another_skips_too(tmp_path: Path) -> None:
    family = family_called("hunyuan_video")
    family.prepare(tmp_path)
    write_clips(tmp_path / "source", count=1)
    start = ("--video_path", "source/clip 0.mp4", "--strength", "0.75")
    project = TinyProject(family, tmp_path)
    plain, _ = generate(project, tmp_path / "plain", *start)
    found, said = generate(project, tmp_path / "mag", *start, *BOLD)
    assert skipped_in(said) == (3, 6)  # c s s s c c, of the six steps that are made
    assert not any(same_parts(found, plain))
    more = (*start, "--save_path", "out", "--magcache_calibration")
    code, said = run_here(*family.generate, *SIZE, *more, folder=tmp_path)
    assert_one_message(code, said, "--magcache_calibration measures all steps", "omit --video_path")
