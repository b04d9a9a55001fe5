"""Weights, wildcards, alternatives and second prompts from the command line to latents, in all families."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import fpack_generate_video
import hv_generate_video
import wan_generate_video
from hunyuan_model.text_encoders import VIDEO_TEMPLATE
from modules.errors import OptionError
from tests.tiny.framepack import write_tiny_framepack
from tests.tiny.hunyuan import write_tiny_hunyuan
from tests.tiny.project import write_image
from tests.tiny.wan import write_tiny_wan

SIZE = ["--video_size", "32", "32", "--infer_steps", "2", "--device", "cpu", "--output_type", "latent"]
# the networks are random and small: what is given to them twice as large has to show
GUIDED = ["--guidance_scale", "4", "--negative_prompt", "dull and grey"]
SYSTEM = VIDEO_TEMPLATE.system


@dataclass(frozen=True)
class Made:
    """Latents and metadata of a video."""

    latents: Tensor
    said: dict[str, str]


@dataclass(frozen=True)
class Tiny:
    """A family's script on its tiny models."""

    main: Callable[..., None]
    words: list[str]
    folder: Path

    def run(self, *arguments: object) -> dict[int, Made]:
        """The videos that are made, by seed."""
        number = len(list(self.folder.glob("made*")))
        made = self.folder / f"made{number}"
        self.main(["--save_path", str(made), *SIZE, *self.words, *map(str, arguments)])
        found = {}
        for path in made.glob("*_latent.safetensors"):
            with safe_open(path, "pt") as file:
                found[int(path.name.split("_")[1])] = Made(load_file(path)["latent"], file.metadata())
        return found

    def one(self, *arguments: object) -> Made:
        (made,) = self.run("--seed", 1, *arguments).values()
        return made


def _wan(folder: Path) -> Tiny:
    models = write_tiny_wan(folder / "model").models
    return Tiny(wan_generate_video.main, ["--task", "t2v-1.3B", "--video_length", "1", *models], folder)


def _hunyuan(folder: Path) -> Tiny:
    return Tiny(
        hv_generate_video.main, ["--video_length", "1", *write_tiny_hunyuan(folder / "model").models], folder
    )


def _framepack(folder: Path) -> Tiny:
    write_image(folder / "start.png", 32, 32)
    words = ["--image_path", str(folder / "start.png"), "--video_sections", "1", "--latent_window_size", "1"]
    return Tiny(fpack_generate_video.main, [*words, *write_tiny_framepack(folder / "model").models], folder)


MAKE = {"wan": _wan, "hunyuan": _hunyuan, "framepack": _framepack}
WITH_CLIP = ("hunyuan", "framepack")


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    found: dict[str, Tiny] = {}

    def of(name: str) -> Tiny:
        if name not in found:
            found[name] = MAKE[name](tmp_path_factory.mktemp(name))
        return found[name]

    return of


@pytest.fixture(params=MAKE)
def tiny(request: pytest.FixtureRequest, tinies: Callable[[str], Tiny]) -> Tiny:
    return tinies(request.param)


@pytest.fixture(params=WITH_CLIP)
def with_clip(request: pytest.FixtureRequest, tinies: Callable[[str], Tiny]) -> Tiny:
    return tinies(request.param)


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    for name, content in {
        "color": "red\nblue\ngreen\nblack\n",
        "beast": "__color__ cat\n__color__ dog\n",
    }.items():
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
    return tmp_path


def test_weights_of_one_and_switches_alone_change_no_bit(tiny: Tiny, cards: Path) -> None:
    plain = tiny.one("--prompt", "a red car", *GUIDED)
    neutral = ["--prompt", "a (red:1.0) car", "--guidance_scale", 4, "--negative_prompt", "dull (and:1) grey"]
    weighed = tiny.one(*neutral, "--prompt_weighting")
    drawn = tiny.one("--prompt", "a red car", *GUIDED, "--prompt_wildcards", cards, "--prompt_alternatives")
    assert torch.equal(weighed.latents, plain.latents)
    assert torch.equal(drawn.latents, plain.latents)


def test_weights_change_the_video_and_stand_in_the_metadata_as_typed(tiny: Tiny) -> None:
    say = ["--prompt", "a (red:3) car", "--prompt_weighting"]
    plain, weighed = tiny.one("--prompt", "a red car"), tiny.one(*say)
    assert not torch.equal(weighed.latents, plain.latents)
    assert weighed.said["bt_prompt"] == "a (red:3) car"
    assert weighed.said["bt_prompt_weighting"] == "True"
    assert "bt_prompt_weighting" not in plain.said
    assert not torch.equal(weighed.latents, tiny.one("--prompt", "a (red:3) car").latents)  # marks are text


def test_a_drawn_prompt_is_that_prompt(tiny: Tiny, cards: Path) -> None:
    typed = "a __beast__ on a {mat|{rug|bed}}"
    draw = ["--prompt_wildcards", cards, "--prompt_alternatives"]
    drawn = tiny.one("--prompt", typed, *draw)
    prompt = drawn.said["bt_prompt"]
    assert prompt.split()[:1] == ["a"]
    assert prompt.split()[2] in {"cat", "dog"}
    assert prompt.split()[-1] in {"mat", "rug", "bed"}
    assert drawn.said["bt_original_prompt"] == typed
    assert (drawn.said["bt_prompt_wildcards"], drawn.said["bt_prompt_alternatives"]) == (cards.name, "True")

    written = tiny.one("--prompt", prompt)
    assert torch.equal(drawn.latents, written.latents)
    assert "bt_original_prompt" not in written.said
    again = tiny.one("--prompt", typed, *draw)
    assert again.said["bt_prompt"] == prompt


def test_without_the_switches_all_marks_are_text(tiny: Tiny) -> None:
    text = r"a __color__ {red|blue} (car:1.4) \{"
    assert tiny.one("--prompt", text).said["bt_prompt"] == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a __no__"], r"--prompt: __no__ needs the file .*no.txt"),
        (["--prompt", "a", "--negative_prompt", "__../x__"], "--negative_prompt: .* does not name a file"),
        (["--prompt", "a __two__"], r"two.txt, line 2: __no__ needs the file"),
        (["--prompt", "(red:500) car", "--prompt_weighting"], "--prompt_weighting: .* more than 100"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is_loaded(
    tiny: Tiny, cards: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (cards / "two.txt").write_text("# one of\n__no__\n", encoding="utf-8")
    made = tmp_path / "made"
    with pytest.raises(OptionError, match=message):
        tiny.main(["--save_path", str(made), *SIZE, *tiny.words, "--prompt_wildcards", str(cards), *words])
    assert not made.exists()  # it is made before the first network is loaded


def test_a_second_prompt_is_for_clip_and_a_line_may_give_it(with_clip: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("a cat --d 1\na cat --d 2 --p2 a dog\na cat --d 3 --p2 a cat\n", encoding="utf-8")
    made = with_clip.run("--from_file", file)

    for seed, more in {1: [], 2: ["--prompt_2", "a dog"], 3: []}.items():
        (alone,) = with_clip.run("--prompt", "a cat", "--seed", seed, *more).values()
        assert torch.equal(made[seed].latents, alone.latents)
    (plain,) = with_clip.run("--prompt", "a cat", "--seed", 2).values()
    assert not torch.equal(made[2].latents, plain.latents)
    assert made[2].said["bt_prompt_2"] == "a dog"
    assert "bt_prompt_2" not in made[1].said


def test_sections_have_their_weights_and_second_prompts(tinies: Callable[[str], Tiny]) -> None:
    tiny = tinies("framepack")
    two = ["--video_sections", 2, "--prompt", "0:a cat;;;1:a dog"]
    plain = tiny.one(*two)
    same = tiny.one(*two, "--prompt_2", "0:a cat;;;1:a dog")
    other = tiny.one(*two, "--prompt_2", "0:a cat;;;1:a bird")
    assert torch.equal(plain.latents, same.latents)
    assert not torch.equal(plain.latents, other.latents)
    weighed = tiny.one("--video_sections", 2, "--prompt", "0:a cat;;;1:a (dog:3)", "--prompt_weighting")
    # made from the end: the first section that is made, and so all that follow it, differ
    assert not torch.equal(plain.latents, weighed.latents)
    assert weighed.said["bt_prompt"] == "0:a cat;;;1:a (dog:3)"


@pytest.mark.parametrize(
    ("neutral", "real"),
    [
        (["--hidden_state_skip_layer", "2"], ["--hidden_state_skip_layer", "1"]),
        (["--hidden_state_skip_layer", "2"], ["--apply_final_norm"]),
        (["--te_multiplier", "1", "1"], ["--te_multiplier", "2", "1"]),
        (["--te_multiplier", "1", "1"], ["--te_multiplier", "1", "2"]),
        (["--custom_system_prompt", SYSTEM], ["--custom_system_prompt", "Name the colours."]),
    ],
)
def test_the_language_model_is_read_as_the_options_say(
    with_clip: Tiny, neutral: list[str], real: list[str]
) -> None:
    plain = with_clip.one("--prompt", "a cat").latents
    assert torch.equal(with_clip.one("--prompt", "a cat", *neutral).latents, plain)
    changed = with_clip.one("--prompt", "a cat", *real)
    assert not torch.equal(changed.latents, plain)
    assert f"bt_{real[0][2:]}" in changed.said
