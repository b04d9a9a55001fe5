"""Count the files and functions of ours on two ways: a clip to a LoRA, and a prompt with that LoRA to a clip.

    python benchmarks/way.py

Runs the pocket model's commands in this process under a profiler, without workers, and prints what was
called: plain functions of product files (no comprehension, lambda or class body) and the lines of their
bodies.
"""

import argparse
import contextlib
import inspect
import io
import logging
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NOT_PRODUCT = {"benchmarks", "tests", "docs", "pocket", ".venv"}
MODEL = ["--task", "t2v-1.3B", "--dit", str(ROOT / "pocket/dit.safetensors")]
VAE = ["--vae", str(ROOT / "pocket/vae.safetensors")]
T5 = ["--t5", str(ROOT / "pocket/t5.safetensors")]
CLIP = "--video_size 64 64 --video_length 17 --infer_steps 2 --guidance_scale 3 --flow_shift 3 --seed 1"
TRAINING = (
    "--sdpa --network_module networks.lora_wan --network_dim 4 --learning_rate 1e-3 "
    "--timestep_sampling shift --mixed_precision bf16 --max_train_steps 2 --max_data_loader_n_workers 0 "
    "--seed 1 --output_name way"
)
TABLE = """[general]
resolution = [64, 64]
caption_extension = ".txt"
[[datasets]]
video_directory = "{folder}/clips"
cache_directory = "{folder}/cache"
target_frames = [17]
"""

Command = tuple[Callable[[Sequence[str]], None], list[str]]


def commands(folder: Path) -> dict[str, list[Command]]:
    """Return the commands of each way, with the clip and its dataset file written into the folder."""
    import wan_cache_latents
    import wan_cache_text_encoder_outputs
    import wan_generate_video
    import wan_train_network
    from modules.media.writing import write_video

    (folder / "clips").mkdir()
    write_video(folder / "clips/a.mp4", iter(np.zeros((17, 64, 64, 3), np.uint8)), 16.0)
    (folder / "clips/a.txt").write_text("a red circle moving left", encoding="utf-8")
    (folder / "d.toml").write_text(TABLE.format(folder=folder.as_posix()), encoding="utf-8")
    data = ["--dataset_config", str(folder / "d.toml")]
    made = ["--lora_weight", str(folder / "way.safetensors"), "--save_path", str(folder / "videos")]
    return {
        "one clip, cache and train": [
            (wan_cache_latents.main, [*data, *VAE, "--num_workers", "1"]),
            (wan_cache_text_encoder_outputs.main, [*data, *T5]),
            (wan_train_network.main, [*MODEL, *data, *TRAINING.split(), "--output_dir", str(folder)]),
        ],
        "one prompt with a LoRA": [
            (
                wan_generate_video.main,
                [*MODEL, *VAE, *T5, *made, *CLIP.split(), "--prompt", "a red circle moving left"],
            ),
        ],
    }


def count(way: Sequence[Command]) -> tuple[int, int, int]:
    """Run commands; return how many files and functions of ours were called, and their lines."""
    called: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            called.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        for main, words in way:
            main(words)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    ours = {code for code in called if code.co_flags & inspect.CO_OPTIMIZED and _is_product(code)}
    lines = sum(max(line or 0 for *_, line in code.co_lines()) - code.co_firstlineno + 1 for code in ours)
    return len({code.co_filename for code in ours}), len(ours), lines


def _is_product(code: CodeType) -> bool:
    path = Path(code.co_filename)
    if code.co_name.startswith("<") or not path.is_relative_to(ROOT):
        return False
    return path.relative_to(ROOT).parts[0] not in NOT_PRODUCT


def measure() -> dict[str, tuple[int, int, int]]:
    """Return files, functions and lines of each way."""
    logging.disable()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        return {name: count(way) for name, way in commands(Path(folder)).items()}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for name, (files, functions, lines) in measure().items():
        print(f"{name}: {files} files, {functions} functions, {lines:,} lines of bodies")


if __name__ == "__main__":
    main()
