"""gen_img.py from the command line, and the lines of its prompt files."""

import logging
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gen_img
from modules.errors import OptionError, UserError
from modules.limits import MAX_VARIANTS
from modules.media.reading import read_image, read_tags
from stable_diffusion.lines import LINE_OPTIONS, enumerates, expand, read_line, read_line_seeds
from tests.commands import QUIET, ROOT, run_python
from tests.stable_diffusion.loaded import load, make_images, write_guide, write_kohya
from tests.stable_diffusion.test_mistakes import write_good
from tests.tiny.control_nets import write_control_net
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1, write_sdxl
from tests.warm_processes import CAN_BE_WARM, WarmProcess


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    common = ["--ckpt", str(write_sd1(folder)), "--tokenizer_cache_dir", str(tokenizer_folder(folder / "t"))]
    return [*common, "--device", "cpu", "--W", "32", "--H", "24", "--steps", "2"]


def make(model: list[str], out: Path, *words: object) -> list[Path]:
    """The pictures of a run, by their numbers."""
    gen_img.main([*model, "--outdir", str(out), "--sequential_file_name", *map(str, words)])
    return sorted(out.iterdir())


@pytest.mark.slow
def test_the_texts_of_a_picture_make_it_again(model: list[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a {red|green} (cat:1.2) --n bad\n# no\nwrong --s 0\na {sea|boat} --s 3 --l 3\nsand --nl 2\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError, match="1 of 4 failed:\n  line 3: OptionError: --steps 0"):
        make(model, tmp_path / "a", "--from_file", prompts, "--batch_size", 3, "--seed", 1)
    made = sorted((tmp_path / "a").iterdir())
    assert len(made) == 3

    for path in made:
        texts = read_tags(path)
        line = [texts["prompt"], "--d", texts["seed"], "--s", texts["steps"], "--l", texts["scale"]]
        for character, name in (("--n", "negative-prompt"), ("--nl", "negative-scale")):
            line += [character, texts[name]] if name in texts else []
        (again,) = make(model, tmp_path / path.stem, "--prompt", " ".join(line))
        assert (read_image(again) == read_image(path)).all()


@pytest.mark.slow
def test_packages_that_nothing_uses_are_not_loaded(tmp_path: Path) -> None:
    words = ["--ckpt", f"{tmp_path}/none.pt", "--outdir", str(tmp_path), "--prompt", "x", "--device", "cpu"]
    code = (
        "import sys, gen_img\n"
        "from modules.errors import UserError\n"
        f"try: gen_img.main({words!r})\n"
        "except UserError: pass\n"
        "print(sorted({'diffusers', 'transformers', 'peft', 'bitsandbytes'} & {*sys.modules}))\n"
    )
    done = run_python("-c", code, folder=ROOT)
    assert done.stdout.strip() == "['diffusers']"
    assert not done.stderr


PROMPTS = 60  # a fast machine does not make them all before it is stopped
PATIENCE = 300  # seconds


@pytest.mark.slow
@pytest.mark.skipif(not CAN_BE_WARM, reason="signals are sent to a copied process")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)], ids=["kill", "Ctrl-C"]
)
def test_a_run_that_is_stopped_keeps_what_is_done(number: int, code: int, tmp_path: Path) -> None:
    folder = write_good(tmp_path / "a project ü")
    lines = [f"picture {index} --d {index}" for index in range(PROMPTS)]
    (folder / "prompts é.txt").write_text("\n".join(lines), encoding="utf-8-sig")  # with a BOM
    out = folder / "out put"
    options = ("--ckpt", "sd1.safetensors", "--tokenizer_cache_dir", "tokenizers", "--steps", "20")
    files = ("--from_file", "prompts é.txt", "--outdir", str(out), "--sequential_file_name")
    command = [str(ROOT / "gen_img.py"), *options, *files, "--W", "64", "--H", "64"]

    process = WarmProcess(command, folder, QUIET, tmp_path / "log", tmp_path / "log")
    deadline = time.monotonic() + PATIENCE
    while not (out / "im_000002.png").exists() and process.poll() is None:
        assert time.monotonic() < deadline, "the process hangs"
        time.sleep(0.01)
    process.send_signal(number)

    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert process.wait(timeout=PATIENCE) == code, said
    made = sorted(path for path in out.iterdir() if not path.name.startswith("."))
    assert 2 <= len(made) < PROMPTS
    for index, path in enumerate(made):
        with Image.open(path) as image:
            image.load()
            assert image.info["prompt"] == f"picture {index}"
    assert "Traceback" not in said


LINES = (
    "a (red:1.4) cat on a mat --n [blurry], bad --d 11",
    "the sea BREAK a boat ((in the night)) --n ugly --d 12",
    "a house, a tree, a very long road that winds through the hills and comes back --d 13",
    "nothing --d 14",
)
PARTS = (
    "a cat AND a (dog:1.3) --n bad --d 21",
    "the sea BREAK a boat AND sand --d 22",
    "a house AND a road --n [ugly] --d 23",
    "red AND blue --d 24",
)
SMALL = (
    *("--W", "64", "--H", "48", "--steps", "3", "--max_embeddings_multiples", "2", "--sequential_file_name"),
)
NETWORK = ("--network_module", "networks.lora", "--network_weights")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_good(tmp_path_factory.mktemp("project"))
    places = {"second": ("sd1.safetensors", ".attn2"), "xl": (write_sdxl(folder), ".attn")}
    for name, (ckpt, place) in places.items():
        model = load(folder / ckpt, "--tokenizer_cache_dir", folder / "tokenizers")
        write_kohya(folder / f"{name}.safetensors", model, lambda path, place=place: place in path)
    (folder / "lines.txt").write_text("\n".join(LINES), encoding="utf-8")
    (folder / "parts.txt").write_text("\n".join(PARTS), encoding="utf-8")
    write_control_net(folder / "control.safetensors", "sd1")
    (folder / "pictures").mkdir()
    for number in range(4):
        write_guide(folder / "pictures" / f"{number}.png", number, (64, 64))
    return folder


def assert_same(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> None:
    assert len(some) == len(others) == 4
    for one, other in zip(some, others, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 1
    assert len({image.tobytes() for image in some}) == 4
    assert all(image.std() > 5 for image in some)


XL = ("--ckpt", "sdxl.safetensors")
SD = ("--ckpt", "sd1.safetensors")
CASES = {
    "regions": (
        *(*SD, "--from_file", "parts.txt", "--mask_path", "mask.png", "--sampler", "dpm_2_a"),
        *(*NETWORK, "lora.safetensors", "second.safetensors"),
    ),
    "image to image": (*SD, "--from_file", "lines.txt", "--image_path", "pictures", "--sampler", "euler_a"),
    "xl": (
        *(*XL, "--from_file", "lines.txt", "--sampler", "euler_a", "--negative_scale", "2"),
        *(*NETWORK, "xl.safetensors"),
    ),
    "control": (
        *(*SD, "--from_file", "parts.txt", "--mask_path", "mask.png", "--sampler", "dpm_2_a"),
        *("--control_net_models", "control.safetensors", "--guide_image_path", "pictures"),
    ),
    "grown": (
        *(*SD, "--from_file", "parts.txt", "--mask_path", "mask.png", "--sampler", "euler_a"),
        *("--gradual_latent_timesteps", "900", "--gradual_latent_every_n_steps", "1"),
        *(*NETWORK, "lora.safetensors", "second.safetensors"),
    ),
}


@pytest.mark.slow_cases("regions")
@pytest.mark.parametrize(
    "case",
    ["regions", *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "regions")],
)
def test_four_at_once_are_the_four_single_pictures(case: str, project: Path, tmp_path: Path) -> None:
    single = make_images(project, tmp_path / "single", *SMALL, *CASES[case])
    batch = make_images(
        project, tmp_path / "batch", *SMALL, *CASES[case], "--batch_size", 4, "--vae_batch_size", 0.5
    )

    assert_same(batch, single)


@pytest.mark.slow
def test_parts_without_a_mask_are_averaged_everywhere(project: Path, tmp_path: Path) -> None:
    """One LoRA acts on all of them."""
    common = (*SD, "--sampler", "ddim", *NETWORK, "lora.safetensors")
    [once] = make_images(project, tmp_path / "once", *SMALL, *common, "--prompt", "a cat --d 5")
    [twice] = make_images(project, tmp_path / "twice", *SMALL, *common, "--prompt", "a cat AND a cat --d 5")
    [mixed] = make_images(project, tmp_path / "mixed", *SMALL, *common, "--prompt", "a cat AND the sea --d 5")

    assert np.abs(twice - once).max() <= 1
    assert np.abs(mixed - once).max() > 5


# an option of each letter in the guide, its key, and what is read
READ: list[tuple[str, str, Any]] = [
    ("--n ugly, bad", "negative_prompt", "ugly, bad"),
    ("--w 512", "W", 512),
    ("--h 768", "H", 768),
    ("--s 30", "steps", 30),
    ("--d 1,2, 3", "seeds", (1, 2, 3)),
    ("--l 7.5", "scale", 7.5),
    ("--nl -1", "negative_scale", -1.0),
    ("--t 0.5", "strength", 0.5),
    ("--am 1,0.5,-2", "network_mul", (1.0, 0.5, -2.0)),
    ("--c a clip text", "clip_prompt", "a clip text"),
    ("--f name", "file_name", "name"),
    ("--ow 10", "original_width", 10),
    ("--oh 20", "original_height", 20),
    ("--nw 30", "original_width_negative", 30),
    ("--nh 40", "original_height_negative", 40),
    ("--ct 5", "crop_top", 5),
    ("--cl 6", "crop_left", 6),
    ("--dsd1 3", "ds_depth_1", 3),
    ("--dst1 600", "ds_timesteps_1", 600),
    ("--dsd2 none", "ds_depth_2", None),
    ("--dst2 400", "ds_timesteps_2", 400),
    ("--dsr 0.4", "ds_ratio", 0.4),
    ("--glt 700", "gradual_latent_timesteps", 700),
    ("--glr 0.6", "gradual_latent_ratio", 0.6),
    ("--gls 0.1", "gradual_latent_ratio_step", 0.1),
    ("--gle 2", "gradual_latent_every_n_steps", 2),
    ("--glsn 0.9", "gradual_latent_s_noise", 0.9),
    ("--glus 3,0.5,0.5,1", "gradual_latent_unsharp_params", "3,0.5,0.5,1"),
]


def test_every_letter_of_the_guide_is_read() -> None:
    line = " ".join(["a cat", *(option for option, _, _ in READ)])

    assert read_line(line) == {"prompt": "a cat", **{key: value for _, key, value in READ}}
    assert [option.split()[0] for option, _, _ in READ] == [f"--{character}" for character in LINE_OPTIONS]


def test_capital_letters_and_long_names_are_read_too() -> None:
    found = read_line("a cat --W 512 --steps 7 --strength 0.3 --nl none")
    assert found == {"prompt": "a cat", "W": 512, "steps": 7, "strength": 0.3, "negative_scale": None}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a --d 1,x", "--d: 'x' is not a whole number"),
        ("a --d 99999999999999999999999", "--d: a seed has at most 64 bits"),
        ("a --am 1,two", "--am: 'two' is not a number"),
        ("a --f ../b", "--f '../b': pass a file's name"),
        ("a --f ..", "pass a file's name"),
        ("a --f \x1b[31mred", "--f '\\x1b[31mred': pass a file's name"),
        ("a --f left\u202egnp", "pass a file's name"),
        ("a --f " + "字" * 100, "the name has 300 bytes"),
        ("a --glus 2,1,1", "--glus: "),
    ],
)
def test_what_cannot_be_read_is_named(line: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_line(line)
    assert words in str(caught.value)


def test_an_unknown_option_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_line("a cat --zz 3 --s 4", "line 2") == {"prompt": "a cat", "steps": 4}
    assert "line 2 'a cat --zz 3 --s 4': the unknown option --zz 3 is ignored" in caplog.text


def test_a_line_has_the_long_names_of_other_scripts(caplog: pytest.LogCaptureFixture) -> None:
    found = read_line("a --width 64 --height 32 --steps 3 --seed 4 --cfg 5 --negative x")
    expected = {"W": 64, "H": 32, "steps": 3, "seeds": (4,), "scale": 5.0, "negative_prompt": "x"}
    assert found == {"prompt": "a", **expected}
    assert not caplog.records


def test_seeds_are_found_before_variants_are_chosen() -> None:
    assert read_line_seeds("a") is None
    assert read_line_seeds("a --seed 7,8") == (7, 8)
    assert read_line_seeds("a {b|c} --D 7,8 --n x") == (7, 8)
    with pytest.raises(OptionError, match="not a whole number"):
        read_line_seeds("a {b --d 1|c}")


# prompt -> all texts that it may stand for
CHOICES = {
    "a cat": {"a cat"},
    "a {red|green} cat": {"a red cat", "a green cat"},
    "{only}": {"only"},
    "{a|}": {"a", ""},
    "{2$$a|b|c}": {"a, b", "a, c", "b, c"},
    "{1-2$$a|b}": {"a", "b", "a, b"},
    "{-1$$a|b}": {"", "a", "b"},
    "{2-$$a|b|c}": {"a, b", "a, c", "b, c", "a, b, c"},
    "{2$$ and $$a|b|c}": {"a and b", "a and c", "b and c"},
    "{2$$$$a|b}": {"ab"},
    "{9$$a|b}": {"a, b"},
    "{a|{b|{c|d}}}": {"a", "b", "c", "d"},
    "{2$$ and $$a|{b|c}}": {"a and b", "a and c"},
    r"\{a|b\} {c|d}": {"{a|b} c", "{a|b} d"},
    r"{\{a\}|b}": {"{a}", "b"},
    "{a|b": {"{a|b"},
    "{ee|b}": {"ee", "b"},
    r"\{e$$a|b}": {"{e$$a|b}"},
    "a|b}": {"a|b}"},
    r"(a\:{b|c})": {r"(a\:b)", r"(a\:c)"},
}


@pytest.mark.parametrize("prompt", CHOICES)
def test_each_choice_comes_up_and_nothing_else(prompt: str) -> None:
    texts = [expand(prompt, Random(seed)) for seed in range(80)]

    assert all(len(found) == 1 for found in texts)
    assert {found[0] for found in texts} == CHOICES[prompt]
    assert not enumerates(prompt)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("{e$$a|b} cat", ["a cat", "b cat"]),
        ("{E$$a|b}", ["a", "b"]),
        ("{e$$a|b} {e$$c|d}", ["a c", "a d", "b c", "b d"]),
        ("{e$$2$$a|b|c}", ["a, b", "a, c", "b, c"]),
        ("{e$$1-2$$ + $$a|b}", ["a", "b", "a + b"]),
        ("{e$$a|{e$$b|c}}", ["a", "b", "c"]),
        ("{e$$a|a|b}", ["a", "b"]),
        (r"{e$$\{a\}|b}", ["{a}", "b"]),
    ],
)
def test_all_combinations_are_made_in_order(prompt: str, expected: list[str]) -> None:
    assert expand(prompt, Random(1)) == expected
    assert enumerates(prompt)


def test_the_same_seed_chooses_the_same_in_each_combination() -> None:
    for seed in range(20):
        red, blue = expand("{e$$red|blue} {cat|dog|cow} in {2$$ and $$a|b|c}", Random(seed))
        assert red.removeprefix("red") == blue.removeprefix("blue")
        assert expand("{e$$red|blue} {cat|dog|cow} in {2$$ and $$a|b|c}", Random(seed)) == [red, blue]


def test_more_combinations_than_any_run_makes_are_an_error() -> None:
    many = "{e$$" + "|".join(map(str, range(101))) + "}"
    with pytest.raises(OptionError, match=f"more than {MAX_VARIANTS:,} variants. Omit some"):
        expand(many * 2, Random(0))
    with pytest.raises(OptionError, match="variants"):
        expand("{e$$1-40$$" + "a|" * 60 + "}", Random(0))
    assert expand("{" + "9" * 30 + "$$a|b}", Random(0))[0] in {"9" * 30 + "$$a", "b"}
