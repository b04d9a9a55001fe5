"""Stand in for the programs that jobs of a page start: `python stand_in_jobs.py SCRIPT ARGUMENTS...`.

A `run` writes the history, samples and files of a training in seconds, and saves and ends at Ctrl-C or when
a file asks for it. A check takes a second; whether it finds a fault depends on the folder. `new` is the real
one. Everything else prints a line and ends, some with an error.
"""

import runpy
import shlex
import signal
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
REAL = "new_project.py"
STEP_SECONDS = 0.1
MAX_STEPS = 40  # that are trained, however many are asked for
SAVE_EVERY = 10


class Asked:
    """Whether somebody wants a training to save and end."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file = folder / f"{name}.stop"
        self.is_interrupted = False
        signal.signal(signal.SIGINT, self._note)

    def _note(self, *_: object) -> None:
        self.is_interrupted = True

    def __bool__(self) -> bool:
        return self.is_interrupted or self.file.exists()


def main(words: list[str]) -> int:
    """Do what a script would do; return its exit code."""
    script = Path(words[0])
    if script.name == REAL:
        sys.argv = words
        sys.path[0] = str(script.parent)
        runpy.run_path(words[0], run_name="__main__")
        return 0
    sys.path.insert(0, str(ROOT))
    sys.stdout.write(f"{script.name} stands in\n")
    sys.stdout.flush()
    if script.name != "run_project.py":
        time.sleep(1)
        return len(words) % 2
    folder = Path(words[1])
    if "--check" in words:
        time.sleep(1)
        return int(sum(map(ord, folder.name)) % 3 == 0)
    try:
        text = (folder / "run.toml").read_text(encoding="utf-8")
        train(words[1:], folder, tomllib.loads(text)["training"])
    except OSError as error:
        sys.stderr.write(f"OptionError: {error}\n")
        return 2
    return 0


def train(words: Sequence[str], folder: Path, values: dict[str, Any]) -> None:
    """Write what a training of a described folder writes, until its last step or until it is asked to end."""
    from project.tracing import RunTrace
    from training.reports.history import History, describe_process, history_path

    output = (folder / str(values["output_dir"])).resolve()
    name = str(values["output_name"])
    steps = int(values.get("max_train_steps", SAVE_EVERY))
    output.mkdir(parents=True, exist_ok=True)
    asked = Asked(output, name)
    trace = RunTrace()
    trace.begin(["run", str(folder)], output=output, name=name, steps=steps)
    trace.note(["python", "wan_cache_latents.py"])
    time.sleep(1)
    trace.note(["python", "wan_train_network.py"])
    history = History(history_path(output, name), int(time.time()))
    start = {
        "model": "wan",
        "total_steps": steps,
        "changed": [["output_dir", str(output)], ["sample_prompts", str(folder / "prompts.txt")]],
        "unchanged": [],
        "listens": True,
        "process": describe_process(),
        "written_in": str(output),
        "working_folder": str(folder),
    }
    history.add(0, started=start)
    step = 0
    for step in range(1, min(steps, MAX_STEPS) + 1):
        history.add(step, loss=1 / step, rates={"lr/unet": 1e-4}, seconds=STEP_SECONDS)
        if step % SAVE_EVERY == 0:
            save(history, output / f"{name}-step{step:08d}.safetensors", step)
        history.flush()
        time.sleep(STEP_SECONDS)
        if asked:
            break
    asked.file.unlink(missing_ok=True)
    is_finished = not asked.is_interrupted and step == min(steps, MAX_STEPS)
    last = f"{name}.safetensors" if is_finished else f"{name}-step{step:08d}.safetensors"
    save(history, output / last, step)
    command = generation_command(values, folder, output / last)
    history.add(step, commands=[["Generate with it", command, command, ""]])
    history.add(
        step, ended="finished" if is_finished else "stopped", kind="good" if is_finished else "stopped"
    )
    history.flush()
    trace.end("", "good")


def save(history: Any, path: Path, step: int) -> None:
    """Write a LoRA with one number, and a sample."""
    import numpy as np
    from safetensors.numpy import save_file

    from modules.media.writing import write_png

    save_file({"x": np.full(1, step, np.float32)}, path, {"ss_base_model_version": "wan"})
    image = path.parent / "sample" / f"{path.stem}_0.png"
    image.parent.mkdir(exist_ok=True)
    write_png(image, np.full((32, 32, 3), 5 * step % 255, np.uint8))
    history.add(step, saved=path.name)
    history.add(step, samples=f"{step:06d}", files={"0": image.name}, prompts={"0": "a cat"})


def generation_command(values: dict[str, Any], folder: Path, lora: Path) -> str:
    """Return the command that makes a clip with a LoRA, of the files that the training had."""
    words = ["python", "wan_generate_video.py", "--task", str(values.get("task", "t2v-1.3B"))]
    for option in ("dit", "vae", "t5"):
        words += [f"--{option}", str(folder / str(values.get(option, f"{option}.safetensors")))]
    words += ["--lora_weight", str(lora), "--lora_multiplier", "1.0", "--prompt", "a cat"]
    words += ["--video_size", "48", "64", "--video_length", "5", "--infer_steps", "2"]
    return shlex.join([*words, "--guidance_scale", "5.0", "--save_path", "out"])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
