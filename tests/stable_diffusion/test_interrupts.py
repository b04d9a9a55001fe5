"""A run of gen_img.py that is killed or interrupted keeps what is done, and nothing half done."""

import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import QUIET, ROOT
from tests.stable_diffusion.bad_files import write_good
from tests.warm_processes import CAN_BE_WARM, WarmProcess

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
