"""The commands in README.md and docs/ run as they stand there, on tiny models and short clips."""

import re
import shlex
from pathlib import Path

import pytest

from tests.commands import ROOT, run_python
from tests.tiny.project import lay_out_models, write_clips

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_HERE = ("quickstart.py", "run_tests.py")  # they have tests of their own, or are running this one
SMALLER = {  # appended, so that the last value wins
    "wan_generate_video.py": ["--video_size", "32", "32", "--video_length", "5", "--infer_steps", "2"],
    "wan_train_network.py": ["--max_train_epochs", "1", "--network_dim", "2", "--max_data_loader_n_workers", "0"],
}
DATASET = """[general]
resolution = [32, 32]
caption_extension = ".txt"
enable_bucket = true

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [1, 5]
"""
PROMPTS = "a cat walks on the grass --d 1\na dog --d 2 --s 2 --g 6\n"


def commands_of(page: Path) -> list[str]:
    """The command lines of a page's bash blocks, in order."""
    text = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    commands = [line for line in lines if line.startswith(("python ", "accelerate launch "))]
    return [command for command in commands if not any(name in command for name in NOT_HERE)]


def test_the_pages_have_commands() -> None:
    assert sum(len(commands_of(page)) for page in PAGES) >= 15


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.stem)
def test_commands_of_the_page_run(page: Path, tmp_path: Path) -> None:
    lay_out_models(tmp_path / "models")
    write_clips(tmp_path / "clips", count=2)
    (tmp_path / "dataset.toml").write_text(DATASET, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    lay_out_inputs(tmp_path)
    commands = commands_of(page)
    for command in commands:
        run_in(tmp_path, command, image_to_video="--clip" in " ".join(commands))


def lay_out_inputs(folder: Path) -> None:
    """A start image and LoRAs, as the pages name them."""
    from tests.tiny.project import write_image, write_lora

    write_image(folder / "start.png", 32, 32)
    for name in ("my_lora", "style"):
        write_lora(folder / "output" / f"{name}.safetensors", folder / "models" / "wan2.1_t2v_1.3B_bf16.safetensors")


def run_in(folder: Path, command: str, image_to_video: bool) -> None:
    words = shlex.split(command)
    if words[0] == "accelerate":
        if not image_to_video or not (folder / "cache").exists():
            cache(folder)
        start = next(index for index, word in enumerate(words) if word.endswith(".py"))
        script, launch = words[start], ["-m", "accelerate.commands.launch", "--cpu", *words[2:start]]
    else:
        start, script, launch = 1, words[1], []
    run_python(*launch, ROOT / script, *words[start + 1 :], *SMALLER.get(script, []), folder=folder)


def cache(folder: Path) -> None:
    """The caches that training needs, where the page does not make them itself."""
    for script, option, file in (
        ("wan_cache_latents.py", "--vae", "Wan2.1_VAE.pth"),
        ("wan_cache_text_encoder_outputs.py", "--t5", "models_t5_umt5-xxl-enc-bf16.pth"),
    ):
        run_python(ROOT / script, "--dataset_config", "dataset.toml", option, folder / "models" / file, folder=folder)
