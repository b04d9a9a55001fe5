"""fpack_generate_video.py through the command line equals a generation made of diffusers' and transformers'
networks alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fpack_generate_video
from modules.media.reading import read_image
from modules.media.writing import write_png
from tests.commands import run_script
from tests.parity import framepack_generation
from tests.parity.framepack_generation import Asked, OneFrame, Theirs
from tests.parity.reference import to_pixels
from tests.parity.running import assert_equal
from tests.tiny.framepack import TinyFramePack, write_tiny_framepack

HEIGHT, WIDTH, STEPS, SEED, PROMPT = 32, 48, 4, 20, "a small rabbit wakes up"
SAY = ("--video_size", HEIGHT, WIDTH, "--infer_steps", STEPS, "--seed", SEED, "--device", "cpu")


@dataclass(frozen=True)
class Project:
    """Models and pictures `0.png` to `2.png` of another shape than the videos, and a mask."""

    folder: Path
    files: TinyFramePack
    theirs: Theirs

    def picture(self, number: int) -> Path:
        return self.folder / f"{number}.png"

    @property
    def mask(self) -> Path:
        return self.folder / "mask.png"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder, random = tmp_path_factory.mktemp("framepack"), numpy.random.default_rng(7)
    for number, (rows, columns) in enumerate([(50, 60), (24, 40), (HEIGHT, WIDTH)]):
        small = random.integers(0, 256, (5, 5, 3), dtype=numpy.uint8)
        write_png(
            folder / f"{number}.png",
            numpy.kron(small, numpy.ones((rows // 5 + 1, columns // 5, 1), dtype=numpy.uint8)),
        )
    grey = random.integers(0, 256, (4, 6), dtype=numpy.uint8)
    write_png(
        folder / "mask.png",
        numpy.kron(numpy.repeat(grey[..., None], 3, 2), numpy.ones((8, 8, 1), dtype=numpy.uint8)),
    )
    return Project(folder, write_tiny_framepack(folder / "models"), Theirs(folder / "models"))


def generate(out: Path, project: Project, *arguments: object, in_process: bool = True) -> Tensor:
    """The latents that the script leaves, 1 16 F h w."""
    words = [*project.files.models, "--save_path", out / "made", "--output_type", "latent", *SAY, *arguments]
    if in_process:
        fpack_generate_video.main([str(word) for word in words])
    else:
        out.mkdir(parents=True, exist_ok=True)
        run_script("fpack_generate_video.py", *words, folder=out)
    (path,) = (out / "made").glob("*_latent.safetensors")
    return load_file(path)["latent"][None]


@dataclass(frozen=True)
class Video:
    """Options of the command line, and the same said to the reference.

    images: numbers of pictures by section.
    """

    options: Sequence[object]
    images: Sequence[int] = (0,)
    prompts: Sequence[str] = (PROMPT,)
    end: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def sections(self) -> int:
        return max(len(self.images), len(self.prompts))


GUIDE = ("--guidance_scale", 3, "--negative_prompt", "dull, blurry")
GUIDED = {"scale": 3.0, "negative": "dull, blurry"}
TWO = {"images": (0, 0)}
VIDEOS: dict[str, Video] = {
    "1 section": Video([]),
    "2 sections": Video([], **TWO),
    "F1, 1 section": Video(["--f1"], settings={"is_f1": True}),
    "F1, 2 sections": Video(["--f1"], **TWO, settings={"is_f1": True}),
    "end image": Video(["--end_image_path", "{1}"], **TWO, end=1),
    "guidance": Video(GUIDE, settings=GUIDED),
    "guidance, nothing to avoid": Video(["--guidance_scale", 3], settings={"scale": 3.0}),
    "guidance, rescaled": Video(
        [*GUIDE, "--guidance_rescale", 0.7], **TWO, settings=GUIDED | {"rescale": 0.7}
    ),
    "guidance, rescaled, F1": Video(
        [*GUIDE, "--guidance_rescale", 0.7, "--f1"], settings=GUIDED | {"rescale": 0.7, "is_f1": True}
    ),
    "embedded guidance": Video(["--embedded_cfg_scale", 3], settings={"embedded_guidance": 3.0}),
    "shift": Video(["--flow_shift", 5], settings={"flow_shift": 5.0}),
    "paddings": Video(["--latent_paddings", "0"], **TWO, settings={"paddings": (0,)}),
    "texts and images of sections": Video(
        ["--prompt", "it sits;;;1:it walks;;;-1:it sleeps", "--image_path", "{0};;;1-2:{1}"],
        images=(0, 1, 1),
        prompts=("it sits", "it walks", "it sleeps"),
    ),
    "texts and images of sections, F1": Video(
        ["--prompt", "it sits;;;-1:it sleeps", "--image_path", "{0};;;1:{1}", "--f1"],
        images=(0, 1),
        prompts=("it sits", "it sleeps"),
        settings={"is_f1": True},
    ),
    "5 sections": Video(["--infer_steps", 1], images=(0,) * 5, settings={"steps": 1}),
    "2 steps": Video(["--infer_steps", 2], settings={"steps": 2}),
}
AS_PROGRAMS = {"2 sections", "F1, 2 sections"}  # the others run in this process, to save time


@pytest.mark.parametrize("name", VIDEOS)
def test_latents_of_a_video_equal_the_reference(tmp_path: Path, project: Project, name: str) -> None:
    case = VIDEOS[name]
    pictures = [project.picture(number) for number in range(3)]
    options = [str(word).format(*pictures) for word in case.options]
    usual = ["--prompt", PROMPT, "--image_path", pictures[0], "--video_sections", case.sections]

    latents = generate(tmp_path, project, *usual, *options, in_process=name not in AS_PROGRAMS)

    asked = Asked(
        HEIGHT,
        WIDTH,
        **{"steps": STEPS, **case.settings},
        seed=SEED,
        prompts=[case.prompts[min(section, len(case.prompts) - 1)] for section in range(case.sections)],
        images=[
            pictures[case.images[min(section, len(case.images) - 1)]] for section in range(case.sections)
        ],
        end=None if case.end is None else pictures[case.end],
    )
    assert_equal(latents, framepack_generation.video(project.theirs, asked), name)


COARSE = {"clean_latent_2x_indices": range(11, 13), "clean_latent_4x_indices": range(13, 29)}
# settings, controls, whether the first has a mask
PICTURES: dict[str, tuple[str, Sequence[int], bool, OneFrame]] = {
    "default": ("default", (), False, OneFrame(9, (0, 10), True, COARSE)),
    "edited": ("no_2x,no_4x,no_post,target_index=9", (1,), False, OneFrame(9, (0,), False)),
    "kisekaeichi": (
        "target_index=1,control_index=0;10,no_post,no_2x,no_4x",
        (1, 2),
        True,
        OneFrame(1, (0, 10), False),
    ),
    "1f-mc": ("target_index=9,control_index=0;1", (1, 2), False, OneFrame(9, (0, 1, 10), True, COARSE)),
}


@pytest.mark.parametrize(("name", "guide"), [*((name, False) for name in PICTURES), ("kisekaeichi", True)])
def test_latents_of_one_picture_equal_the_reference(
    tmp_path: Path, project: Project, name: str, guide: bool
) -> None:
    settings, controls, has_mask, places = PICTURES[name]
    paths = [project.picture(number) for number in controls]
    options: list[object] = [
        *("--prompt", PROMPT, "--image_path", project.picture(0), "--one_frame_inference", settings)
    ]
    options += ["--control_image_path", *paths] if paths else []
    options += ["--control_image_mask_path", project.mask] if has_mask else []
    options += [*GUIDE, "--guidance_rescale", 0.7] if guide else []

    latents = generate(tmp_path, project, *options)

    masks = [project.mask if has_mask and index == 0 else None for index in range(len(paths))]
    asked = Asked(
        *(HEIGHT, WIDTH, STEPS, SEED, [PROMPT], [project.picture(0)]),
        **(GUIDED | {"rescale": 0.7} if guide else {}),
    )
    where = OneFrame(
        places.target, places.clean, places.has_black, places.coarse, list(zip(paths, masks, strict=True))
    )
    assert_equal(latents, framepack_generation.picture(project.theirs, asked, where), name)


@pytest.mark.parametrize("at_once", [False, True], ids=["blended", "at once"])
def test_pictures_of_a_video_equal_the_reference(tmp_path: Path, project: Project, at_once: bool) -> None:
    options = [
        *("--prompt", PROMPT, "--image_path", project.picture(0), "--video_sections", 2),
        *("--output_type", "latent_images"),
    ]

    latents = generate(tmp_path, project, *options, *(["--bulk_decode"] if at_once else []))

    (folder,) = (path for path in (tmp_path / "made").iterdir() if path.is_dir())
    ours = to_pixels([read_image(path) for path in sorted(folder.iterdir())])
    expected = framepack_generation.frames_of(project.theirs, latents, at_once).clamp(-1, 1)
    assert ours.shape == expected.shape == (1, 3, 73, HEIGHT, WIDTH)
    # half a step of 8 bits, and the error of the VAE in float32
    assert torch.allclose(ours, expected, atol=0.51 / 127.5)
