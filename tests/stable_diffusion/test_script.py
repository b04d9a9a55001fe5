"""gen_img.py: files say enough to make them again, and no picture depends on its batch."""

import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gen_img
from modules.errors import UserError
from modules.media.reading import read_image, read_tags
from tests.commands import QUIET, ROOT
from tests.stable_diffusion.bad_files import write_good, write_lora, write_picture
from tests.stable_diffusion.loaded import make_pictures
from tests.tiny.control_nets import write_control_net, write_lllite
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
        for letter, name in (("--n", "negative-prompt"), ("--nl", "negative-scale")):
            line += [letter, texts[name]] if name in texts else []
        (again,) = make(model, tmp_path / path.stem, "--prompt", " ".join(line))
        assert (read_image(again) == read_image(path)).all()


@pytest.mark.slow
def test_packages_that_nothing_uses_are_not_loaded(tmp_path: Path) -> None:
    words = [
        *("--ckpt", str(tmp_path / "none.pt"), "--prompt", "x", "--device", "cpu"),
        *("--outdir", str(tmp_path)),
    ]
    code = (
        "import sys, gen_img\n"
        "from modules.errors import UserError\n"
        f"try: gen_img.main({words!r})\n"
        "except UserError: pass\n"
        "print(sorted({'diffusers', 'transformers', 'peft', 'bitsandbytes'} & {*sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(gen_img.__file__).parent,
    )
    assert done.stdout.strip() == "['diffusers']"
    assert not done.stderr


PROMPTS = 6
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
    write_sdxl(folder)
    write_lora(folder / "second.safetensors", seed=1)
    for number in (0, 1):
        write_lora(folder / f"xl{number}.safetensors", "sdxl", seed=number)
    (folder / "lines.txt").write_text("\n".join(LINES), encoding="utf-8")
    (folder / "parts.txt").write_text("\n".join(PARTS), encoding="utf-8")
    write_control_net(folder / "control.safetensors", "sd1")
    write_lllite(folder / "lllite.safetensors")
    (folder / "pictures").mkdir()
    for number in range(4):
        write_picture(folder / "pictures" / f"{number}.png", seed=number)
    return folder


def assert_same(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> None:
    assert len(some) == len(others) == 4
    for one, other in zip(some, others, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 1
    assert len({picture.tobytes() for picture in some}) == 4
    assert all(picture.std() > 5 for picture in some)


XL = ("--ckpt", "sdxl.safetensors")
SD = ("--ckpt", "sd1.safetensors")
CASES = {
    "lora": (*SD, "--from_file", "lines.txt", *NETWORK, "lora.safetensors", "--sampler", "euler_a"),
    "regions": (
        *(*SD, "--from_file", "parts.txt", "--mask_path", "mask.png", "--sampler", "dpm_2_a"),
        *(*NETWORK, "lora.safetensors", "second.safetensors"),
    ),
    "image to image": (*SD, "--from_file", "lines.txt", "--image_path", "pictures", "--sampler", "euler_a"),
    "xl": (
        *(*XL, "--from_file", "lines.txt", "--sampler", "euler_a", "--negative_scale", "2"),
        *(*NETWORK, "xl0.safetensors"),
    ),
    "control": (
        *(*SD, "--from_file", "parts.txt", "--mask_path", "mask.png", "--sampler", "dpm_2_a"),
        *("--control_net_models", "control.safetensors", "--guide_image_path", "pictures"),
    ),
    "xl control": (
        *(*XL, "--from_file", "lines.txt", "--sampler", "euler_a"),
        *("--control_net_lllite_models", "lllite.safetensors", "--guide_image_path", "pictures"),
    ),
    "grown": (
        *(*SD, "--from_file", "parts.txt", "--mask_path", "mask.png", "--sampler", "euler_a"),
        *("--gradual_latent_timesteps", "900", "--gradual_latent_every_n_steps", "1"),
        *(*NETWORK, "lora.safetensors", "second.safetensors"),
    ),
}
USUAL = {"regions", "xl"}  # the others are slow together


def _cases(names: Iterable[str], usual: Collection[str]) -> list[Any]:
    return [name if name in usual else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("case", _cases(CASES, USUAL))
def test_four_at_once_are_the_four_single_pictures(case: str, project: Path, tmp_path: Path) -> None:
    single = make_pictures(project, tmp_path / "single", *SMALL, *CASES[case])
    batch = make_pictures(
        project, tmp_path / "batch", *SMALL, *CASES[case], "--batch_size", 4, "--vae_batch_size", 0.5
    )

    assert_same(batch, single)


@pytest.mark.slow
def test_parts_without_a_mask_are_averaged_everywhere(project: Path, tmp_path: Path) -> None:
    """One LoRA acts on all of them."""
    common = (*SD, "--sampler", "ddim", *NETWORK, "lora.safetensors")
    [once] = make_pictures(project, tmp_path / "once", *SMALL, *common, "--prompt", "a cat --d 5")
    [twice] = make_pictures(project, tmp_path / "twice", *SMALL, *common, "--prompt", "a cat AND a cat --d 5")
    [mixed] = make_pictures(
        project, tmp_path / "mixed", *SMALL, *common, "--prompt", "a cat AND the sea --d 5"
    )

    assert np.abs(twice - once).max() <= 1
    assert np.abs(mixed - once).max() > 5
