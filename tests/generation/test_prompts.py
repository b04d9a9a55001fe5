"""Weights, wildcards, second prompts and pairs of features, from the command line to latents."""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
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
from modules.media.writing import write_video
from tests.generation.guided import SAY, STEPS, Script, is_finite, write_scripts
from tests.tiny.framepack import write_tiny_framepack
from tests.tiny.hunyuan import write_tiny_hunyuan
from tests.tiny.project import moving_square, write_image
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


TEXT = ("--prompt", "a (cat:1.5) with __colour__ eyes", *SAY[2:])


@dataclass(frozen=True)
class Feature:
    """Options as typed, with {folder} for the folder of inputs; of some families alone."""

    words: str
    families: str = "wan hunyuan skyreels framepack"  # the kinds whose names begin with one of these


FEATURES = {
    "schedule": Feature("--cfg_schedule 1-2:4"),
    "skip mode": Feature("--cfg_skip_mode early --cfg_apply_ratio 0.5"),
    "slg original": Feature("--slg_mode original --slg_layers 1 --slg_end 1"),
    "slg uncond": Feature("--slg_mode uncond --slg_layers 1 --slg_end 1"),
    "zero scaling": Feature("--cfgzerostar_scaling"),
    "zero init": Feature("--cfgzerostar_init_steps 1"),
    "perp neg": Feature("--perp_neg 1.5"),
    "rescale": Feature("--guidance_rescale 0.5"),
    "nag": Feature("--nag_scale 4"),
    "no embedded": Feature("--disable_embedded_for_cfg", "hunyuan skyreels"),
    "riflex": Feature("--riflex_index 1 --rope_func comfy", "wan"),
    "slow riflex": Feature("--riflex_index 1", "hunyuan skyreels"),
    "lower precision": Feature("--lower_precision_attention", "wan"),
    "magcache": Feature("--magcache_mag_ratios 1 0.98 0.97 0.9 --magcache_threshold 0.5"),
    "preview": Feature("--preview_latent_every 1"),
    "weights": Feature("--prompt_weighting"),
    "wildcards": Feature("--prompt_wildcards {folder}"),
    "alternatives": Feature("--prompt_alternatives"),
    "lcm": Feature("--sample_solver lcm"),
    "sde": Feature("--sample_solver dpm++sde"),
    "wan v2v": Feature("--video_path {folder}/clip.mp4 --v2v_denoise 0.5 --v2v_extra_noise 0.1", "wan"),
    "hunyuan v2v": Feature("--video_path {folder}/clip.mp4 --strength 0.5", "hunyuan skyreels"),
    "sheet": Feature("--sheet seed=1,2 --output_type both"),
    "swap": Feature("--blocks_to_swap 1", "wan"),  # the others have too few blocks
    "fp8": Feature("--fp8_scaled --upcast_linear"),
    "compile": Feature("--compile --compile_args eager default auto False"),
    "latents": Feature("--num_videos 2"),
    "video": Feature("--video_path {folder}/clip.mp4 --strength 0.7 --v2v_extra_noise 0.02"),
}
# what excludes each other
REFUSED = {
    frozenset({"zero scaling", "perp neg"}),
    frozenset({"slg original", "perp neg"}),
    frozenset({"schedule", "skip mode"}),
    frozenset({"latents", "sheet"}),
}
KINDS = ("wan", "wan i2v", "hunyuan", "skyreels i2v", "framepack", "wan A14B")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs that features need."""
    made = tmp_path_factory.mktemp("inputs")
    (made / "colour.txt").write_text("green\nblue: 2\n", encoding="utf-8")
    write_video(made / "clip.mp4", moving_square(9, 32, 32, seed=0), 16)
    return made


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Script]:
    return write_scripts(tmp_path_factory.mktemp("models"))


def features_of(kind: str) -> list[str]:
    return [
        name
        for name, feature in FEATURES.items()
        if any(kind.startswith(family) for family in feature.families.split())
    ]


def is_one_option(names: Iterable[str]) -> bool:
    """Whether two of the features are values of the same option."""
    options = [FEATURES[name].words.partition(" ")[0] for name in names]
    return len(set(options)) < len(options)


def all_pairs() -> list[tuple[str, tuple[str, ...]]]:
    pairs = [(kind, pair) for kind in KINDS for pair in itertools.combinations(features_of(kind), 2)]
    return [(kind, pair) for kind, pair in pairs if not is_one_option(pair)]


def sample() -> list[tuple[str, tuple[str, ...]]]:
    """A few pairs and triples of each kind, the same in every run; and all that are refused."""
    draw = random.Random(14)
    chosen: list[tuple[str, tuple[str, ...]]] = [
        (kind, tuple(sorted(pair))) for kind, pair in zip(KINDS, sorted(REFUSED, key=sorted), strict=False)
    ]
    for kind in KINDS:
        names = features_of(kind)
        chosen += [(kind, tuple(draw.sample(names, size))) for size in (2, 2, 2, 3, 3)]
    return [(kind, names) for kind, names in chosen if not is_one_option(names)]


def check(scripts: dict[str, Script], kind: str, names: Sequence[str], folder: Path, target: Path) -> None:
    words = [word.format(folder=folder) for name in names for word in FEATURES[name].words.split()]
    if any(set(pair) in REFUSED for pair in itertools.combinations(names, 2)):
        with pytest.raises(OptionError):
            scripts[kind].run(target, *words, say=TEXT)
        return
    made, calls = scripts[kind].run(target, *words, say=TEXT)
    assert len(made) == (2 if {"latents", "sheet"} & {*names} else 1)
    assert is_finite(made)
    assert {call.step for call in calls} <= set(range(STEPS))


def cases(found: Iterable[tuple[str, tuple[str, ...]]]) -> list[object]:
    return [pytest.param(kind, names, id=f"{kind}: {', '.join(names)}") for kind, names in found]


@pytest.mark.parametrize(("kind", "names"), cases(sample()))
def test_features_work_together(
    kind: str, names: tuple[str, ...], scripts: dict[str, Script], folder: Path, tmp_path: Path
) -> None:
    check(scripts, kind, names, folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "names"), cases(all_pairs()))
def test_all_pairs_work_together(
    kind: str, names: tuple[str, ...], scripts: dict[str, Script], folder: Path, tmp_path: Path
) -> None:
    check(scripts, kind, names, folder, tmp_path)
