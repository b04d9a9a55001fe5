"""Edits that the script makes are those of a plain loop; sizes, layouts and refusals of references."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints.opening import open_checkpoint
from hidream_o1.configs import DEV, FULL, HiDreamO1Variant
from hidream_o1.family import HiDreamO1
from hidream_o1.files import HiDreamO1Files
from hidream_o1.options import read_boxes
from hidream_o1.references import LayoutImage, make_references
from hidream_o1.texts import TEMPLATE
from modules.errors import OptionError
from protocols.requests import Prepared, Request
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.hidream_o1.making import look_with, public_tower, shape_of
from tests.hidream_o1.plain import PlainHiDreamO1, edit_clean, velocity
from tests.hidream_o1.test_generation import TIMES, euler, shifted
from tests.parity.running import assert_equal, latents_in
from tests.tiny.hidream_o1 import DEEP_LAYERS, TinyHiDreamO1, write_edit_folder, write_tiny_hidream_o1

HEIGHT, WIDTH, SEED, STEPS = 64, 96, 3, 2
SIZES = ((150, 100), (80, 120), (400, 400))  # of the references
BOXES = [[0.1, 0.4, 0.2, 0.9], [0.5, 1.0, 0.0, 0.8]]
Picture = Image.Image


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyHiDreamO1:
    return write_tiny_hidream_o1(tmp_path_factory.mktemp("model"), edits=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("references")
    generator = numpy.random.default_rng(1)
    paths = []
    for number, (width, height) in enumerate(SIZES):
        coarse = generator.integers(256, size=(8, 8, 3), dtype=numpy.uint8)
        path = folder / f"ä {number}.png"
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


# the released preprocessing, in plain words


def fit(picture: Picture, side: int) -> Picture:
    """To an area, in the same shape: halved while it is large, then bicubic, then the middle of it."""
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    factor = math.sqrt(side * side / (picture.width * picture.height))
    wide, high = picture.width * factor, picture.height * factor
    rounded = [(round(wide), round(high)), (round(wide), int(high)), (int(wide), round(high))]
    sizes = [(width // 32 * 32, height // 32 * 32) for width, height in (*rounded, (int(wide), int(high)))]
    width, height = max((size for size in sizes if math.prod(size) <= side * side), key=math.prod)
    scale = max(width / picture.width, height / picture.height)
    if width / picture.width >= height / picture.height:
        larger = picture.resize((width, round(picture.height * scale)), Image.Resampling.BICUBIC)
    else:
        larger = picture.resize((round(picture.width * scale), height), Image.Resampling.BICUBIC)
    left, top = (larger.width - width) // 2, (larger.height - height) // 2
    return larger.crop((left, top, left + width, top + height))


def shrink(picture: Picture, number: int) -> Picture:
    side = 384 if number <= 4 else 288 if number <= 8 else 192
    ratio = picture.width / picture.height
    size = int(side * ratio**0.5 / 32) * 32, int(side / ratio**0.5 / 32) * 32
    return picture.resize(size, Image.Resampling.LANCZOS)


def side_of(number: int, longer: int) -> int:
    return longer * {1: 64, 2: 48, 3: 32, 4: 32}.get(number, 24 if number <= 8 else 16) // 64


def values_of(picture: Picture) -> Tensor:
    """3 H W in -1..1."""
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def loop(
    files: TinyHiDreamO1,
    references: Sequence[Picture],
    sigmas: Tensor,
    *,
    guidance: float = 5.0,
    scale: float = 8.0,
    deep_layers: Sequence[int] = (),
    number: int | None = None,
    mistake: str = "",
) -> Tensor:
    """The pixels 3 H W at the end of Euler's steps. number: of references, if it is another."""
    state = read_state(files.dit)
    network = PlainHiDreamO1({name: value for name, value in state.items() if not name.startswith("visual.")})
    tokenizer = Tokenizer.from_file(str(files.tokenizer / "tokenizer.json"))
    small = [shrink(picture, number or len(references)) for picture in references]
    rows, deep = look_with(public_tower(state, deep_layers), small)
    tokens = [(picture.height // 32) * (picture.width // 32) for picture in small]
    written = "".join(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in tokens)
    pad = tokenizer.token_to_id("<|image_pad|>")
    shown = [values_of(picture) for picture in references]
    if mistake == "patches in another order":
        shown = shown[::-1]
    noisy = (
        scale * torch.randn(1, 3, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(SEED))[0, :, 0]
    )
    for index in range(len(sigmas) - 1):
        sigma = float(sigmas[index])
        found = []
        for text in ("a cat", " "):
            ids = tokenizer.encode(TEMPLATE.format(f"{written}{text}"), add_special_tokens=False).ids
            looks, at = [], 0
            for count, picture in zip(tokens, small, strict=True):
                at = ids.index(pad, at)
                looks.append((at, picture.height // 32, picture.width // 32))
                at += count
            clean = edit_clean(network, shape_of(), ids, noisy, sigma, shown, looks, rows, deep, mistake)
            found.append(velocity(noisy, clean, sigma))
        wanted, other = found
        noisy = euler(sigmas)(other + guidance * (wanted - other), noisy, index)
    return noisy


def read_state(dit: Path) -> dict[str, Tensor]:
    if dit.is_file():
        return load_file(dit)
    with open_checkpoint(dit) as checkpoint:
        return {name.removeprefix("model."): checkpoint.read(name).clone() for name in checkpoint.tensors}


def edit(
    files: TinyHiDreamO1, folder: Path, paths: Sequence[Path], *words: object, steps: int = STEPS
) -> Tensor:
    """The pixels 3 H W that the script makes, divided by the scale of the noise."""
    shared = ["--prompt", "a cat", "--save_path", "made", "--output_type", "latent", "--device", "cpu"]
    sizes = ["--image_size", HEIGHT, WIDTH, "--infer_steps", steps, "--seed", SEED]
    options = [*shared, *sizes, "--control_image_path", *paths, *words]
    succeed_here("hidream_o1_generate_image.py", *files.models, *map(str, options), folder=folder)
    return latents_in(folder / "made").squeeze(1)


def fitted(paths: Sequence[Path], number: int | None = None) -> list[Picture]:
    side = side_of(number or len(paths), WIDTH)
    return [fit(Image.open(path).convert("RGB"), side) for path in paths]


@pytest.mark.parametrize("number", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_an_edit_is_that_of_a_plain_loop(
    files: TinyHiDreamO1, pictures: list[Path], tmp_path: Path, number: int
) -> None:
    """One reference has the usual shift of the noise levels, several have none."""
    sigmas = shifted(torch.linspace(1, 0, STEPS + 1), 3.0 if number == 1 else 1.0)
    expected = loop(files, fitted(pictures[:number]), sigmas)

    made = 8.0 * edit(files, tmp_path, pictures[:number], "--sample_solver", "vanilla")

    assert_equal(made, expected, "plain loop")


MISTAKES: dict[str, dict[str, Any]] = {
    "sizes of one reference": {"side": side_of(1, WIDTH)},
    "small copies of five": {"number": 5},
    "patches in another order": {"mistake": "patches in another order"},
    "not looked at": {"mistake": "not looked at"},
    "places": {"mistake": "references overlap"},
    "noise levels": {"levels": (0.99, 0.0)},
}


@pytest.mark.slow
def test_each_mistake_in_an_edit_would_show(
    files: TinyHiDreamO1, pictures: list[Path], tmp_path: Path
) -> None:
    def expect(side: int = side_of(2, WIDTH), levels: Sequence[float] = (1.0, 0.0), **changes: Any) -> Tensor:
        references = [fit(Image.open(path).convert("RGB"), side) for path in pictures[:2]]
        return loop(files, references, torch.tensor(levels), **changes)

    made = 8.0 * edit(files, tmp_path, pictures[:2], "--sample_solver", "vanilla", steps=1)
    assert_equal(made, expect(), "plain loop")
    for name, changes in MISTAKES.items():
        with pytest.raises(AssertionError, match="relative error"):
            assert_equal(made, expect(**changes), name)


@pytest.mark.slow
@pytest.mark.parametrize("deep_layers", [DEEP_LAYERS, ()])
def test_deepstack_is_as_the_config_of_a_folder_says(
    pictures: list[Path], tmp_path: Path, deep_layers: tuple[int, ...]
) -> None:
    folder = write_edit_folder(tmp_path / "model", deep_layers)
    files = TinyHiDreamO1(folder, folder)
    levels = torch.tensor([1.0, 0.0])
    made = 8.0 * edit(files, tmp_path, pictures[:1], "--sample_solver", "vanilla", steps=1)

    expected = loop(files, fitted(pictures[:1]), levels, deep_layers=deep_layers)

    assert_equal(made, expected, "plain loop")
    if deep_layers:
        with pytest.raises(AssertionError, match="relative error"):
            assert_equal(made, loop(files, fitted(pictures[:1]), levels))


@pytest.mark.slow
def test_dev_edits_one_reference_by_euler_steps_from_the_noise_of_full(
    files: TinyHiDreamO1, pictures: list[Path], tmp_path: Path
) -> None:
    """At its own noise levels, without guidance; with flash, as without references."""
    sigmas = torch.tensor([TIMES[0], TIMES[14], 0]) / 1000
    expected = loop(files, fitted(pictures[:1]), sigmas, guidance=1.0)

    made = 7.5 * edit(files, tmp_path, pictures[:1], "--model_type", "dev")

    assert_equal(made, expected, "Dev")
    words = ("--model_type", "dev", "--editing_scheduler", "flash", "--save_path", "flash")
    edit(files, tmp_path, pictures[:1], *words)
    assert (latents_in(tmp_path / "flash").squeeze(1) * 7.5 - made).abs().max() > 0.1


def framed(picture: Picture, color: tuple[int, int, int]) -> Picture:
    draw = ImageDraw.Draw(picture)
    for at in range(int(math.sqrt(picture.width * picture.height) * 0.04)):
        draw.rectangle((at, at, picture.width - 1 - at, picture.height - 1 - at), outline=color)
    return picture


@pytest.mark.slow
def test_a_layout_frames_references_and_joins_them(
    files: TinyHiDreamO1, pictures: list[Path], tmp_path: Path
) -> None:
    """The larger box has the first color; the layout counts as a third reference."""
    first, second = fitted(pictures[:2], 3)
    layout = Image.new("RGB", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(layout)
    draw.rectangle((48, 0, 95, 51), outline=(255, 0, 0), width=5)
    draw.rectangle((10, 13, 38, 58), outline=(0, 180, 0), width=5)
    references = [framed(first, (0, 180, 0)), framed(second, (255, 0, 0)), fit(layout, side_of(3, WIDTH))]
    words = ("--layout_bboxes", json.dumps(BOXES), "--sample_solver", "vanilla")
    made = 8.0 * edit(files, tmp_path, pictures[:2], *words, steps=1)

    assert_equal(made, loop(files, references, torch.tensor([1.0, 0.0])), "plain loop")

    # a box has x1, x2, y1, y2
    turned = [[left, top, right, bottom] for left, right, top, bottom in BOXES]
    with pytest.raises(OptionError, match="Correct the order"):
        read_boxes(json.dumps(turned))


def prepare(
    files: TinyHiDreamO1, paths: Sequence[Path], variant: HiDreamO1Variant = FULL, **changes: Any
) -> Prepared:
    family = HiDreamO1(HiDreamO1Files(files.dit), variant=variant, keeps_aspect=changes.pop("keeps", False))
    return family.prepare(Request("a cat", seed=1, control_images=tuple(paths), **changes))


def test_a_result_has_the_shape_of_its_only_reference(files: TinyHiDreamO1, pictures: list[Path]) -> None:
    """Which is not resized again to another area."""
    prepared = prepare(files, pictures[:1], keeps=True)
    (reference,) = prepared.prompts[0].positive.media_before_text
    frame = numpy.array(fit(Image.open(pictures[0]), 2048))
    assert (prepared.height, prepared.width) == frame.shape[:2] == (1664, 2496)
    assert numpy.array_equal(reference.read(), frame)


def test_all_prompts_have_the_references(files: TinyHiDreamO1, pictures: list[Path]) -> None:
    prompts = prepare(files, pictures[:2], nag_prompt="ugly").prompts[0]
    assert prompts.negative is not None
    assert prompts.nag is not None
    shown = prompts.positive.media_before_text
    assert [image.path for image in shown] == pictures[:2]
    assert prompts.negative.media_before_text == prompts.nag.media_before_text == shown


@pytest.mark.parametrize(
    ("variant", "number", "extra", "solver", "warns"),
    [
        (DEV, 1, {}, "euler", False),
        (DEV, 1, {"editing_scheduler": "flash"}, "lcm", False),
        (DEV, 2, {"editing_scheduler": "flash"}, "lcm", True),
        (DEV, 1, {"layout_bboxes": "[[0, 1, 0, 1]]"}, "lcm", False),
        (FULL, 1, {"editing_scheduler": "flow_match"}, "unipc", True),
    ],
)
def test_the_steps_follow_from_the_references(
    files: TinyHiDreamO1,
    pictures: list[Path],
    caplog: pytest.LogCaptureFixture,
    variant: HiDreamO1Variant,
    number: int,
    extra: dict[str, str],
    solver: str,
    warns: bool,
) -> None:
    prepared = prepare(files, pictures[:number], variant, extra=extra)
    assert prepared.solver == solver
    assert ("is ignored because it is for Dev with exactly one" in caplog.text) == warns
    if variant is DEV:
        assert prepared.sigmas == (*(time / 1000 for time in TIMES), 0.0)
    several = number + ("layout_bboxes" in extra) > 1
    assert prepared.flow_shift == (1.0 if several else 3.0)


@pytest.mark.slow
def test_a_plan_knows_references(files: TinyHiDreamO1, pictures: list[Path], tmp_path: Path) -> None:
    shared = ["--prompt", "a cat", "--save_path", "made", "--plan", "--image_size", HEIGHT, WIDTH]
    words = [*shared, "--control_image_path", *pictures[:2]]
    succeed_here("hidream_o1_generate_image.py", *files.models, *map(str, words), folder=tmp_path)


@pytest.mark.parametrize("number", range(1, 11))
def test_sizes_follow_from_the_number_of_references(number: int, pictures: list[Path]) -> None:
    """As in the release, for all numbers; a layout counts."""
    made = make_references([pictures[0]] * number, (), (2048, 1024))
    expected = fit(Image.open(pictures[0]).convert("RGB"), side_of(number, 2048))
    assert numpy.array_equal(made[0].read(), numpy.array(expected))
    with_layout = make_references([pictures[0]] * number, read_boxes("[[0, 1, 0, 1]]"), (2048, 1024))
    assert with_layout[-1].side == with_layout[0].side == side_of(number + 1, 2048)


def test_a_layout_draws_five_boxes_the_largest_first() -> None:
    boxes = [[0, share, 0, share] for share in (0.2, 0.9, 0.4, 0.6, 0.3, 0.8)]
    *_, layout = make_references([Path("a")], read_boxes(json.dumps(boxes)), (1000, 1000))
    assert isinstance(layout, LayoutImage)
    assert [corners[2] for corners, _ in layout.boxes] == [900, 800, 600, 400, 300]


def test_large_references_are_halved_before_they_are_resized(tmp_path: Path) -> None:
    generator = numpy.random.default_rng(3)
    frame = generator.integers(256, size=(700, 900, 3), dtype=numpy.uint8)
    path = tmp_path / "large.png"
    Image.fromarray(frame).save(path)
    (made,) = make_references([path], (), (160, 96))
    assert numpy.array_equal(made.read(), numpy.array(fit(Image.fromarray(frame), 160)))


REFUSED = {
    "--task t2i --control_image_path P": "this run has no vision tower because of --task t2i",
    "--layout_bboxes [[0,1,0,1]]": "there are no references for the boxes",
    "--layout_bboxes [[0,1,0]] --control_image_path P": "not a list of boxes",
    "--layout_bboxes [[0,2,0,1]] --control_image_path P": "is not x1, x2, y1, y2, from 0 to 1",
    "--layout_bboxes [[0,0.001,0,1]] --control_image_path P": "is thinner than a pixel of 96 x 64",
    "--layout_bboxes [[0,1,0,1]] --keep_original_aspect --control_image_path P": "Omit one of them",
    "--keep_original_aspect --control_image_path P P": "needs exactly one reference, without a layout",
    "--control_image_path P P P P P P P P P P P": "11 reference images, but HiDream-O1-Image takes 10",
    "--control_image_path missing.png": "no such file",
    "--model_type dev --infer_steps 29 --control_image_path P": "Dev has 28 fixed noise levels",
}


# each in turn; daily, those that need no file
@pytest.mark.parametrize(
    "words", [pytest.param(words, marks=[pytest.mark.slow] * ("P" in words)) for words in REFUSED]
)
def test_what_an_edit_cannot_use_is_refused(
    files: TinyHiDreamO1, pictures: list[Path], tmp_path: Path, words: str
) -> None:
    shared = ["--prompt", "a cat", "--save_path", "made", "--image_size", HEIGHT, WIDTH, "--device", "cpu"]
    given = [str(pictures[0]) if word == "P" else word for word in words.split()]
    code, said = run_here(
        "hidream_o1_generate_image.py", *files.models, *map(str, shared), *given, folder=tmp_path
    )
    assert REFUSED[words] in assert_one_message(code, said)


def test_references_need_a_file_with_a_tower(pictures: list[Path], tmp_path: Path) -> None:
    files = write_tiny_hidream_o1(tmp_path / "model")
    words = ["--prompt", "a cat", "--save_path", "made", "--control_image_path", str(pictures[0])]
    code, said = run_here("hidream_o1_generate_image.py", *files.models, *words, folder=tmp_path)
    assert "has no vision tower (visual.*)" in assert_one_message(code, said)
