"""gen_img.py with a tiny checkpoint: what its files say is enough to make them again."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import gen_img
from modules.errors import UserError
from modules.media.reading import read_image, read_tags
from tests.commands import QUIET, ROOT
from tests.stable_diffusion.bad_files import write_good
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1
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
