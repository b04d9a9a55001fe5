"""Weights, wildcards, second prompts and features together, from the command line to latents."""

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
GUIDED = ("--guidance_scale", 4, "--negative_prompt", "dull and gray")
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


@pytest.mark.slow_cases("wan")
@KINDS_OF_TEXT
def test_weights_of_one_and_switches_alone_change_no_bit(
    scripts: dict[str, Script], kind: str, cards: Path, tmp_path: Path
) -> None:
    make = scripts[kind].one
    plain = make(tmp_path / "plain", *ONE, "--prompt", "a red car", *GUIDED)
    neutral = ("--prompt", "a (red:1.0) car", "--guidance_scale", 4, "--negative_prompt", "dull (and:1) gray")
    assert torch.equal(make(tmp_path / "weighed", *ONE, *neutral, "--prompt_weighting"), plain)
    switches = ("--prompt_wildcards", cards, "--prompt_alternatives")
    assert torch.equal(make(tmp_path / "drawn", *ONE, "--prompt", "a red car", *GUIDED, *switches), plain)


@pytest.mark.slow_cases("hunyuan")
@KINDS_OF_TEXT
def test_weights_change_the_video_and_stand_in_the_metadata_as_typed(
    scripts: dict[str, Script], kind: str, tmp_path: Path
) -> None:
    make, typed = scripts[kind].one, ("--prompt", "a (red:3) car")
    weighted = make(tmp_path / "weighed", *ONE, *typed, "--prompt_weighting")
    assert not torch.equal(weighted, make(tmp_path / "plain", *ONE, "--prompt", "a red car"))
    assert not torch.equal(weighted, make(tmp_path / "text", *ONE, *typed))  # marks are text
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
        (["--prompt", "a", "--prompt_wildcards", "x"], "--prompt_wildcards x: no such folder"),
        (["--prompt", "a __no__"], r"--prompt: __no__ needs the file .*no.txt"),
        (["--prompt", "a", "--negative_prompt", "__../x__"], "--negative_prompt: .* does not name a file"),
        (["--prompt", "a __two__"], r"two.txt, line 2: __no__ needs the file"),
        (["--prompt", "(red:500) car", "--prompt_weighting"], "--prompt_weighting: .* beyond 100"),
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


@pytest.mark.slow
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


@pytest.mark.slow_cases(
    "framepack-neutral5-real5",
    "framepack-neutral6-real6",
    "hunyuan-neutral0-real0",
    "hunyuan-neutral2-real2",
    "hunyuan-neutral3-real3",
    "hunyuan-neutral4-real4",
)
@pytest.mark.parametrize(
    ("kind", "neutral", "real"),
    [
        ("hunyuan", ["--hidden_state_skip_layer", "2"], ["--hidden_state_skip_layer", "1"]),
        ("hunyuan", [], ["--apply_final_norm"]),
        ("hunyuan", ["--te_multiplier", "1", "1"], ["--te_multiplier", "2", "1"]),
        ("hunyuan", [], ["--te_multiplier", "1", "2"]),
        ("hunyuan", ["--custom_system_prompt", SYSTEM], ["--custom_system_prompt", "Name the colors."]),
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
SLG = "--slg_layers 1 --slg_end 1 --slg_mode"
MAG = "--magcache_mag_ratios 1 0.98 0.97 0.9 --magcache_threshold 0.5"
VIDEO = "--video_path {folder}/clip.mp4 --v2v_extra_noise 0.02 --strength"
RIFLEX = "--riflex_index 1 --rope_func comfy"
COMPILE = "--compile --compile_args eager default auto False"
WORDS = "--prompt_weighting --prompt_wildcards {folder}"
# each feature beside those that touch the same passes, texts, weights or steps
TOGETHER = {
    "wan": [
        f"--cfgzerostar_scaling {SLG} original --cfg_schedule 1-2:4",
        f"--perp_neg 1.5 {SLG} uncond --guidance_rescale 0.5",
        f"--nag_scale 4 {MAG} {WORDS}",
        f"{RIFLEX} --lower_precision_attention --sample_solver lcm",
        f"--blocks_to_swap 1 --fp8_scaled --upcast_linear {MAG}",
        f"{COMPILE} --nag_scale 4 {RIFLEX}",
        f"{VIDEO} 0.5 {MAG} --preview_latent_every 1",
    ],
    "wan i2v": [
        f"--sheet seed=1,2 --output_type both --cfgzerostar_init_steps 1 {MAG}",
        f"--nag_scale 4 {COMPILE} --fp8_scaled",
    ],
    "wan A14B": [
        f"--num_videos 2 --cfg_skip_mode early --cfg_apply_ratio 0.5 {WORDS}",
        f"{VIDEO} 0.7 --nag_scale 4 {SLG} original",
        f"{MAG} --blocks_to_swap 1 --sample_solver dpm++sde",
    ],
    "hunyuan": [
        f"--disable_embedded_for_cfg --cfg_schedule 1-2 --nag_scale 4 {WORDS}",
        f"{VIDEO} 0.7 --riflex_index 1 {SLG} uncond",
        f"{COMPILE} --fp8_scaled --perp_neg 1.5",
    ],
    "skyreels i2v": [
        f"--nag_scale 4 --disable_embedded_for_cfg {MAG} --num_videos 2",
    ],
    "framepack": [
        f"--perp_neg 1.5 {MAG} --preview_latent_every 1",
        f"{VIDEO} 0.7 --nag_scale 4 --prompt_alternatives {WORDS}",
        f"--fp8_scaled {COMPILE} --sample_solver dpm++sde",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs that features need."""
    made = tmp_path_factory.mktemp("inputs")
    (made / "colour.txt").write_text("green\nblue: 2\n", encoding="utf-8")
    write_video(made / "clip.mp4", moving_square(9, 32, 32, seed=0), 16)
    return made


@pytest.mark.slow_cases(
    "framepack---fp8_scaled --compile --compile_args eager default auto False --sample_solver dpm++sde",
    "framepack-words16",
    "framepack-words17",
    "hunyuan---compile --compile_args eager default auto False --fp8_scaled --perp_neg 1.5",
    "hunyuan-words13",
    "skyreels i2v-words15",
    "wan i2v---nag_scale 4 --compile --compile_args eager default auto False --fp8_scaled",
    "wan i2v-words7",
)
@pytest.mark.parametrize(("kind", "words"), [(kind, one) for kind, some in TOGETHER.items() for one in some])
def test_features_work_together(
    kind: str, words: str, scripts: dict[str, Script], folder: Path, tmp_path: Path
) -> None:
    arguments = [word.format(folder=folder) for word in words.split()]
    made, calls = scripts[kind].run(tmp_path, *arguments, say=TEXT)
    assert len(made) == (2 if "--num_videos" in words or "--sheet" in words else 1)
    assert is_finite(made)
    assert {call.step for call in calls} <= set(range(STEPS))
