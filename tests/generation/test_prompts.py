"""Weights, wildcards, second prompts and pairs of features, from the command line to latents."""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hunyuan_model.text_encoders import VIDEO_TEMPLATE
from modules.errors import OptionError
from modules.media.writing import write_video
from tests.generation.guided import SAY, STEPS, Script, is_finite, write_scripts
from tests.tiny.project import moving_square

# the networks are random and small: what is given to them twice as large has to show
GUIDED = ("--guidance_scale", 4, "--negative_prompt", "dull and grey")
ONE = ("--seed", 1, "--infer_steps", 2)
SYSTEM = VIDEO_TEMPLATE.system
KINDS_OF_TEXT = pytest.mark.parametrize("kind", ["wan", "hunyuan"])


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Script]:
    return write_scripts(tmp_path_factory.mktemp("models"))


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    folder = tmp_path / "cards"
    folder.mkdir()
    (folder / "color.txt").write_text("red\nblue\ngreen\nblack\n", encoding="utf-8")
    (folder / "beast.txt").write_text("__color__ cat\n__color__ dog\n", encoding="utf-8")
    return folder


def said_in(folder: Path) -> dict[str, str]:
    """The metadata of the only video."""
    (path,) = folder.glob("*_latent.safetensors")
    with safe_open(path, "pt") as file:
        return file.metadata()


@KINDS_OF_TEXT
def test_weights_of_one_and_switches_alone_change_no_bit(
    scripts: dict[str, Script], kind: str, cards: Path, tmp_path: Path
) -> None:
    make = scripts[kind].one
    plain = make(tmp_path / "plain", *ONE, "--prompt", "a red car", *GUIDED)
    neutral = ("--prompt", "a (red:1.0) car", "--guidance_scale", 4, "--negative_prompt", "dull (and:1) grey")
    assert torch.equal(make(tmp_path / "weighed", *ONE, *neutral, "--prompt_weighting"), plain)
    switches = ("--prompt_wildcards", cards, "--prompt_alternatives")
    assert torch.equal(make(tmp_path / "drawn", *ONE, "--prompt", "a red car", *GUIDED, *switches), plain)


@KINDS_OF_TEXT
def test_weights_change_the_video_and_stand_in_the_metadata_as_typed(
    scripts: dict[str, Script], kind: str, tmp_path: Path
) -> None:
    make, typed = scripts[kind].one, ("--prompt", "a (red:3) car")
    weighed = make(tmp_path / "weighed", *ONE, *typed, "--prompt_weighting")
    assert not torch.equal(weighed, make(tmp_path / "plain", *ONE, "--prompt", "a red car"))
    assert not torch.equal(weighed, make(tmp_path / "text", *ONE, *typed))  # marks are text
    said = said_in(tmp_path / "weighed")
    assert (said["bt_prompt"], said["bt_prompt_weighting"]) == ("a (red:3) car", "True")
    assert "bt_prompt_weighting" not in said_in(tmp_path / "plain")


def test_a_drawn_prompt_is_that_prompt(scripts: dict[str, Script], cards: Path, tmp_path: Path) -> None:
    make, typed = scripts["wan"].one, "a __beast__ on a {mat|{rug|bed}}"
    draw = ("--prompt", typed, "--prompt_wildcards", cards, "--prompt_alternatives")
    drawn = make(tmp_path / "drawn", *ONE, *draw)
    said = said_in(tmp_path / "drawn")
    prompt = said["bt_prompt"]
    _, color, beast, *_, place = prompt.split()
    assert color in {"red", "blue", "green", "black"}
    assert beast in {"cat", "dog"}
    assert place in {"mat", "rug", "bed"}
    assert said["bt_original_prompt"] == typed
    assert (said["bt_prompt_wildcards"], said["bt_prompt_alternatives"]) == (cards.name, "True")

    assert torch.equal(drawn, make(tmp_path / "written", *ONE, "--prompt", prompt))
    assert "bt_original_prompt" not in said_in(tmp_path / "written")
    make(tmp_path / "again", *ONE, *draw)
    assert said_in(tmp_path / "again")["bt_prompt"] == prompt


def test_without_the_switches_all_marks_are_text(scripts: dict[str, Script], tmp_path: Path) -> None:
    text = r"a __color__ {red|blue} (car:1.4) \{"
    scripts["wan"].one(tmp_path, *ONE, "--prompt", text)
    assert said_in(tmp_path)["bt_prompt"] == text


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
    scripts: dict[str, Script], cards: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (cards / "two.txt").write_text("# one of\n__no__\n", encoding="utf-8")
    with pytest.raises(OptionError, match=message):
        scripts["wan"].made(tmp_path / "made", "--prompt_wildcards", cards, *words)
    assert not (tmp_path / "made").exists()  # it is made before the first network is loaded


def test_a_second_prompt_is_for_clip_and_a_line_may_give_it(
    scripts: dict[str, Script], tmp_path: Path
) -> None:
    script, file = scripts["hunyuan"], tmp_path / "lines.txt"
    file.write_text("a cat --d 1\na cat --d 2 --p2 a dog\na cat --d 3 --p2 a cat\n", encoding="utf-8")
    made = script.made(tmp_path / "file", "--infer_steps", 2, "--from_file", file)

    for seed, more in {1: [], 2: ["--prompt_2", "a dog"], 3: []}.items():
        folder = tmp_path / str(seed)
        alone = script.one(folder, "--infer_steps", 2, "--prompt", "a cat", "--seed", seed, *more)
        assert torch.equal(made[seed], alone)
    plain = script.one(tmp_path / "plain", "--infer_steps", 2, "--prompt", "a cat", "--seed", 2)
    assert not torch.equal(made[2], plain)
    assert said_in(tmp_path / "2")["bt_prompt_2"] == "a dog"
    assert "bt_prompt_2" not in said_in(tmp_path / "1")


def test_sections_have_their_weights_and_second_prompts(scripts: dict[str, Script], tmp_path: Path) -> None:
    def make(prompt: str, *more: str) -> torch.Tensor:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return scripts["framepack"].one(folder, *ONE, "--video_sections", 2, "--prompt", prompt, *more)

    plain = make("0:a cat;;;1:a dog")
    assert torch.equal(plain, make("0:a cat;;;1:a dog", "--prompt_2", "0:a cat;;;1:a dog"))
    assert not torch.equal(plain, make("0:a cat;;;1:a dog", "--prompt_2", "0:a cat;;;1:a bird"))
    # made from the end: the first section that is made, and so all that follow it, differ
    assert not torch.equal(plain, make("0:a cat;;;1:a (dog:3)", "--prompt_weighting"))
    assert said_in(tmp_path / "3")["bt_prompt"] == "0:a cat;;;1:a (dog:3)"


@pytest.mark.parametrize(
    ("kind", "neutral", "real"),
    [
        ("hunyuan", ["--hidden_state_skip_layer", "2"], ["--hidden_state_skip_layer", "1"]),
        ("hunyuan", [], ["--apply_final_norm"]),
        ("hunyuan", ["--te_multiplier", "1", "1"], ["--te_multiplier", "2", "1"]),
        ("hunyuan", [], ["--te_multiplier", "1", "2"]),
        ("hunyuan", ["--custom_system_prompt", SYSTEM], ["--custom_system_prompt", "Name the colours."]),
        ("framepack", ["--hidden_state_skip_layer", "2"], ["--hidden_state_skip_layer", "1"]),
        ("framepack", [], ["--te_multiplier", "1", "2"]),
    ],
)
def test_the_language_model_is_read_as_the_options_say(
    scripts: dict[str, Script], tmp_path: Path, kind: str, neutral: list[str], real: list[str]
) -> None:
    make = scripts[kind].one
    plain = make(tmp_path / "plain", *ONE, "--prompt", "a cat")
    if neutral:
        assert torch.equal(make(tmp_path / "neutral", *ONE, "--prompt", "a cat", *neutral), plain)
    assert not torch.equal(make(tmp_path / "real", *ONE, "--prompt", "a cat", *real), plain)
    assert f"bt_{real[0][2:]}" in said_in(tmp_path / "real")


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
        chosen += [(kind, tuple(draw.sample(names, size))) for size in (2, 3, 3)]
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
