"""Lines become pictures: seeds, variants, settings, input pictures, batches."""

import logging
from pathlib import Path
from typing import Any

import pytest

from modules.devices import Failures
from modules.errors import OptionError
from stable_diffusion.asking import RequestBuilder, batches, check_line, make_seeds
from stable_diffusion.contract import SD1, SDXL, ImageSettings, ModelKind, RequestedImage
from stable_diffusion.lines import Inputs, Line, find_inputs
from stable_diffusion.options import GenImgOptions
from stable_diffusion.sampling_options import DeepShrinkOptions, GradualLatentOptions, SizeOptions
from tests.stable_diffusion.loaded import options, write_image

A = Line("the prompt", "a cat")
NONE = Inputs()


def ask(
    asked: GenImgOptions, *lines: Line, kind: ModelKind = SD1, inputs: Inputs = NONE
) -> list[RequestedImage]:
    """The pictures of one round of lines."""
    seeds = make_seeds(asked, lines)
    if asked.prompts.iter_same_seed:
        seeds.begin_round()
    return list(RequestBuilder(asked, kind, inputs, seeds).build_requests(lines, Failures(strict=True)))


def seeds_of(*arguments: object, lines: tuple[str, ...] = ("a",)) -> list[int]:
    found = ask(options(*arguments), *(Line(f"line {n}", text) for n, text in enumerate(lines)))
    return [image.seed for image in found]


# Seeds


def test_the_seed_is_that_of_the_only_picture() -> None:
    assert seeds_of("--seed", 7) == [7]
    assert seeds_of("--seed", 7, "--iter_same_seed") == [7]


def test_a_line_gives_its_seeds_and_the_rest_is_drawn() -> None:
    drawn = seeds_of("--seed", 7, "--images_per_prompt", 2)

    assert seeds_of("--seed", 7, lines=("a --d 11",)) == [11]
    assert seeds_of("--seed", 7, "--images_per_prompt", 3, lines=("a --d 11,12",)) == [11, 12, drawn[0]]
    assert seeds_of("--seed", 7, lines=("a --d 5", "b", "c --d 6", "d")) == [5, drawn[0], 6, drawn[1]]


def test_seeds_that_are_not_used_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert seeds_of(lines=("a --d 1,2,3",)) == [1]
        assert seeds_of(lines=("{e$$a|b|c} --d 1,2",)) == [1, 1, 1]
    assert "--d has more seeds than are used. Raise --images_per_prompt" in caplog.text
    assert "--d has more seeds than are used. All variants use the first one" in caplog.text
    caplog.clear()
    seeds_of("--images_per_prompt", 3, lines=("a --d 1,1,1", "b --d 4,5,6"))
    assert not caplog.records


def test_all_prompts_of_a_round_may_have_the_same_seeds() -> None:
    found = seeds_of("--seed", 7, "--iter_same_seed", "--images_per_prompt", 2, lines=("a", "b --d 3", "c"))

    assert found[:2] == found[4:]
    assert len(set(found[:2])) == 2
    assert found[2:4] == [3, found[0]]


def test_variants_are_chosen_by_each_pictures_seed() -> None:
    asked = options("--seed", 3, "--images_per_prompt", 6)
    found = ask(asked, Line("the prompt", "a {1|2|3|4|5} --n {6|7|8|9} --s {10|11}"))

    again = [ask(options(), Line("", f"{image.raw_prompt} --d {image.seed}"))[0] for image in found[::-1]]
    assert [one.prompt for one in again[::-1]] == [one.prompt for one in found]
    assert [one.negative_prompt for one in again[::-1]] == [one.negative_prompt for one in found]
    assert [one.settings.steps for one in again[::-1]] == [one.settings.steps for one in found]
    assert len({one.prompt for one in found}) > 1
    assert {one.raw_prompt for one in found} == {"a {1|2|3|4|5} --n {6|7|8|9} --s {10|11}"}


def test_all_combinations_share_one_seed() -> None:
    found = ask(options("--seed", 7, "--images_per_prompt", 9), Line("", "{e$$red|blue} {cat|dog}"))

    assert [image.seed for image in found] == [7, 7]
    assert found[0].prompt.removeprefix("red") == found[1].prompt.removeprefix("blue")


# Settings


def test_a_picture_takes_what_its_line_says_before_what_the_options_say() -> None:
    asked = options(
        *("--W", 64, "--H", 72, "--steps", 9, "--negative_scale", 2, "--crop_top", 4),
        *("--sampler", "k_euler_a", "--ds_depth_1", 3, "--gradual_latent_timesteps", 700),
    )
    line = "a AND b --n c --w 128 --s 4 --l 2 --t 0.3 --ow 5 --dst1 600 --glr 0.25"
    (found,) = ask(asked, Line("line 1", line))

    assert (found.prompt, found.negative_prompt) == ("a AND b", "c")
    assert found.settings == ImageSettings(
        width=128,
        height=72,
        steps=4,
        scale=2.0,
        negative_scale=2.0,
        strength=0.3,
        sizes=SizeOptions(original_width=5, crop_top=4),
        num_parts=2,
        deep_shrink=DeepShrinkOptions(ds_depth_1=3, ds_timesteps_1=600),
        gradual_latent=GradualLatentOptions(gradual_latent_timesteps=700, gradual_latent_ratio=0.25),
    )
    (plain,) = ask(asked, Line("line 2", "a --dsd1 none --glt none"))
    assert plain.settings.deep_shrink is plain.settings.gradual_latent is None


@pytest.mark.parametrize(("kind", "side"), [(SD1, 512), (SDXL, 1024)])
def test_the_usual_size_is_that_of_the_model(kind: ModelKind, side: int) -> None:
    (found,) = ask(options("--H", 64), A, kind=kind)
    assert (found.settings.width, found.settings.height) == (side, 64)
    assert found.settings.strength == 0.8


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a --w 100", "--W 100: sizes are multiples of 8 pixels. Pass 96"),
        ("a --glt 700", "--sampler euler_a only"),
        ("a --d x", "--d: 'x' is not a whole number"),
        ("a {b --s x|c --s y}", "--s: '"),
    ],
)
def test_a_line_that_cannot_be_used_is_found_before_a_model_is_loaded(line: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_line(options(), Line("line 3", line))
    assert words in str(caught.value)


def test_what_does_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = options("--crop_top", 0)
    with caplog.at_level(logging.WARNING):
        ask(asked, A, kind=SDXL)
        ask(options("--highres_fix_scale", 0.5), Line("", "a --t 0.3"))
        ask(options("--ds_depth_1", 3), Line("", "a --dsr 0.3"))
        assert not caplog.records
        ask(asked, A)
        ask(options(), Line("", "a --t 0.3"))
        ask(options(), Line("", "a --dst1 600 --dsr 0.3 --gls 0.2"))
    assert "a: without --dsd1, --dst1 and --dsr does nothing" in caplog.text
    assert "a: without --glt, --gls does nothing" in caplog.text
    assert "sizes and crops are ignored because only Stable Diffusion XL" in caplog.text
    assert "--strength is ignored because the image begins with noise" in caplog.text


# Input pictures


def test_pictures_of_a_folder_are_used_in_turn(tmp_path: Path) -> None:
    for name in "cab":
        write_image(tmp_path / "in" / f"{name}.png", size=(45, 30))
    mask = write_image(tmp_path / "mask.png")
    asked = options(
        *("--image_path", tmp_path / "in", "--mask_path", mask, "--images_per_prompt", 2, "--prompt", "x")
    )
    found = ask(asked, A, A, inputs=find_inputs(asked.prompts, 0))

    assert [image.image.stem for image in found if image.image] == ["a", "b", "c", "a"]
    assert {image.mask for image in found} == {mask}
    assert {(one.settings.width, one.settings.height) for one in found} == {(40, 24)}


def test_a_size_that_is_asked_for_goes_before_that_of_the_picture(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", size=(45, 30))
    asked = options("--image_path", image, "--prompt", "x", "--W", 64)
    (found,) = ask(asked, A, inputs=find_inputs(asked.prompts, 0))
    assert (found.settings.width, found.settings.height) == (64, 24)


def test_each_picture_takes_as_many_guides_as_there_are_control_nets(tmp_path: Path) -> None:
    for name in "abcde":
        write_image(tmp_path / "in" / f"{name}.png")
    single = write_image(tmp_path / "z.png")
    prompts = options(
        *("--guide_image_path", tmp_path / "in", single, "--control_net_models", "a", "b")
    ).prompts
    inputs = find_inputs(prompts, 2)
    stems = [[path.stem for path in inputs.select_guides(number)] for number in range(4)]
    assert stems == [["a", "b"], ["c", "d"], ["e", "z"], ["a", "b"]]
    with pytest.raises(OptionError, match="6 images for 7 ControlNets. Pass one for each"):
        find_inputs(prompts, 7)
    assert Inputs().select_guides(3) == ()


def test_a_mask_needs_a_picture_or_parts(tmp_path: Path) -> None:
    inputs = Inputs(masks=(tmp_path / "mask.png",))
    with pytest.raises(OptionError, match="Write AND between its parts"):
        ask(options(), A, inputs=inputs)
    (found,) = ask(options(), Line("", "a AND b"), inputs=inputs)
    assert found.settings.num_parts == 2
    assert found.mask == tmp_path / "mask.png"


# Batches


def test_a_batch_has_equal_settings_and_inputs() -> None:
    lines = ["a", "b", "c --s 3", "d --s 3", "e --glt 1", "f", "g --am 1", "h --d 4 --n x", "i --w 64", "j"]
    asked = options("--sampler", "euler_a")
    images = ask(asked, *(Line(text, text) for text in lines))

    def names(size: int) -> list[str]:
        return ["".join(image.label[0] for image in batch) for batch in batches(images, size)]

    assert names(8) == ["ab", "cd", "e", "fgh", "i", "j"]
    assert names(2) == ["ab", "cd", "e", "fg", "h", "i", "j"]
    assert names(1) == list("abcdefghij")
    assert list(batches([], 4)) == []


@pytest.mark.parametrize("change", [{"image": Path("a")}, {"mask": Path("a")}, {"guides": (Path("a"),)}])
def test_pictures_with_other_inputs_are_another_batch(change: dict[str, Any]) -> None:
    (one,) = ask(options(), A)
    other = RequestedImage(**{**one.__dict__, **change})
    same = RequestedImage(**{**other.__dict__, **{key: type(value)(value) for key, value in change.items()}})
    assert [len(batch) for batch in batches([one, other, same], 4)] == [1, 2]


def test_a_vae_in_float32_is_told_where_all_is(caplog: pytest.LogCaptureFixture) -> None:
    options("--no_half_vae", "--fp16")
    assert not caplog.messages

    options("--no_half_vae")
    assert caplog.messages == ["--no_half_vae is ignored because none of --fp16, --bf16 is given"]
