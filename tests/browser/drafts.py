"""A described folder as `new` writes it, for a model whose files are not there."""

from pathlib import Path
from typing import Any

import numpy as np

from modules.media.writing import write_png

RUN = """\
# Paths are relative to this folder, in which `run` works; it can be moved.
[training]
dit = "dit.safetensors"
dataset_config = "dataset.toml"
sdpa = true
mixed_precision = "bf16"
gradient_checkpointing = true  # half of the memory
network_module = "networks.lora_wan"
network_dim = 32
learning_rate = 0.0002
seed = 42
output_dir = "output"
output_name = "fluff"
task = "t2v-1.3B"
vae = "vae.safetensors"
t5 = "t5.safetensors"
max_train_steps = 2000
sample_prompts = "prompts.txt"
sample_every_n_steps = 200
sample_at_first = true
their_key = 7

# what `run` looks for and runs; the training leaves it alone
[reelsmith]
files = ["dit.safetensors", "vae.safetensors", "t5.safetensors"]
commands = [\
["python", "tools/download.py", "--family", "wan", "--task", "t2v-1.3B", "--to", "models"], \
["python", "wan_cache_latents.py", "--dataset_config", "dataset.toml", "--vae", "vae.safetensors"], \
["python", "wan_train_network.py", "--config_file", "run.toml"]]
"""
DATASET = """\
[general]
resolution = [64, 64]
caption_extension = ".txt"
trigger_word = "fluff"

[[datasets]]
image_directory = "."
cache_directory = "cache/images"
"""
PROMPTS = """\
# mine
fluff, in falling snow --w 64 --h 64 --f 1 --n ugly  --d 1 --s 4

fluff, in a kitchen --W 64 --d 2
# the end
"""


def write_draft(root: Path, run: str = RUN, prompts: str = PROMPTS, pictures: int = 2) -> Path:
    """Write a described folder with pictures, below a root; return it."""
    folder = root / "clips"
    folder.mkdir(parents=True)
    for number in range(pictures):
        write_png(folder / f"p{number}.png", np.full((64, 64, 3), 20 * number, np.uint8))
        (folder / f"p{number}.txt").write_text("fluff", encoding="utf-8")
    (folder / "run.toml").write_text(run, encoding="utf-8")
    (folder / "dataset.toml").write_text(DATASET, encoding="utf-8")
    (folder / "prompts.txt").write_text(prompts, encoding="utf-8")
    return folder


def unfold(page: Any, *parts: str) -> None:
    """Open parts of the page New that are folded: `memory`, `settings`."""
    for part in parts:
        page.locator(f"#{part}-fold > summary").click()
