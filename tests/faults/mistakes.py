"""Commands of every script that work, for tests that make one mistake in them, and how these are run.

Reading a tensor of a model's file counts as loading it: `Loading` ends the command there.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.state import AcceleratorState

from checkpoints.containers import SafetensorsFile, TorchFile
from tests.faults.messages import run_here
from tests.faults.runs import FAMILIES, FRAMEPACK, HUNYUAN_VIDEO, TOKENIZERS, WAN, Scripts

LOADED = "a model was loaded"


class Loading(BaseException):
    """A tensor of a model is about to be read."""


@dataclass(frozen=True)
class GoodCommand:
    """A command that works in the project of a family."""

    family: str
    words: tuple[str, ...]


def _training(scripts: Scripts, script: str, learner: tuple[str, ...]) -> GoodCommand:
    data = ("--dataset_config", "dataset.toml", "--max_data_loader_n_workers", "0")
    output = ("--output_dir", "made", "--output_name", "x", *learner)
    return GoodCommand(scripts.name, (script, *scripts.models, *TOKENIZERS[scripts.name], *data, *output))


def _all_commands() -> dict[str, GoodCommand]:
    found: dict[str, GoodCommand] = {}
    for scripts in FAMILIES:
        name, tokenizers = scripts.name, TOKENIZERS[scripts.name]
        uncached = ("--dataset_config", "uncached.toml")
        image = ("--image_path", "start.png") if scripts is FRAMEPACK else ()
        small = ("--video_size", "32", "32", "--infer_steps", "1", "--save_path", "made")
        commands = (
            (*scripts.cache_latents, *uncached),
            (*scripts.cache_texts, *uncached, *tokenizers),
            (scripts.generate_script, *scripts.models, *tokenizers, *image, *small, "--prompt", "a cat"),
        )
        found |= {words[0]: GoodCommand(name, words) for words in commands}
        learner = ("--network_module", scripts.learner[1], "--learning_rate", "1e-3")
        found[scripts.train_script] = _training(scripts, scripts.train_script, learner)
    full = {"wan_train.py": WAN, "hv_train.py": HUNYUAN_VIDEO, "fpack_train.py": FRAMEPACK}
    found |= {script: _training(scripts, script, ()) for script, scripts in full.items()}
    files = ("--dit", "model/dit.safetensors", "--lora_weight", "lora.safetensors")
    merge = ("merge_lora.py", *files, "--save_merged_model", "never.safetensors")
    convert = ("convert_lora.py", "--input", "lora.safetensors", "--output", "never.safetensors")
    found["merge_lora.py"] = GoodCommand(WAN.name, merge)
    found["convert_lora.py"] = GoodCommand(WAN.name, (*convert, "--target", "other"))
    average = ("lora_post_hoc_ema.py", "lora.safetensors", "second.safetensors")
    found["lora_post_hoc_ema.py"] = GoodCommand(WAN.name, (*average, "--output_file", "never.safetensors"))
    return found


COMMANDS = _all_commands()
NETWORK_TRAININGS = ("wan_train_network.py", "hv_train_network.py", "fpack_train_network.py")
FULL_TRAININGS = ("wan_train.py", "hv_train.py", "fpack_train.py")
TRAININGS = (*NETWORK_TRAININGS, *FULL_TRAININGS)
GENERATIONS = ("wan_generate_video.py", "hv_generate_video.py", "fpack_generate_video.py")


def drop(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """The words of a command without some options and what stands behind these."""
    kept, is_dropped = [], False
    for word in words:
        if word.startswith("--"):
            is_dropped = word in options
        if not is_dropped:
            kept.append(word)
    return kept


@contextlib.contextmanager
def no_model_is_loaded() -> Iterator[None]:
    """Raise Loading when a tensor of a file in the folder `model` is read."""

    def guard(method: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Any, name: str, *rest: Any) -> Any:
            if "model" in self.path.parts:
                raise Loading
            return method(self, name, *rest)

        return read

    kinds = (SafetensorsFile, TorchFile)
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(patch.object(kind, "borrow", guard(kind.borrow)))
        yield


def try_mistake(
    script: str, *words: object, folder: Path, without: Sequence[str] = ()
) -> tuple[int | str, str]:
    """Run a good command with more words behind it. Returns the exit code, or LOADED, and what it said.

    without: options to omit of the good command.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with no_model_is_loaded():
            return run_here(*drop(COMMANDS[script].words, without), *words, folder=folder)
    except Loading:
        return LOADED, ""
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
