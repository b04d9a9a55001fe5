"""Tell from its names whether a transformer was distilled to few steps; training would undo that."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_ANYWHERE = "turbo|lightning|schnell|distill?ed|distill|lightx2v|causvid|accvid|fusionx|fastwan|fasthunyuan"
_WORDS = r"lcm|dmd2?|hyper|[248](?:_steps|steps?)"  # only as whole words: they occur inside others
# a model whose distillation was undone, and one that was distilled only to take its guidance as a number
_UNDONE = re.compile(r"(?:(?<![a-z])(?:de|un|non)_|de|un|non)(?:turbo|schnell|distill?(?:ed)?)")
_GUIDED = re.compile(r"(?:cfg|guidance)_?distill?(?:ed)?")
_TITLES = ("modelspec.title", "modelspec.architecture", "title", "name", "general.name", "model_name")
# file names that say nothing about their model; the folder's name is used instead
_PLAIN = re.compile(r"(diffusion_pytorch_)?model.*|transformer.*|unet.*")
# suffixes of files; what follows any other dot belongs to the name, as in the folder Qwen-Image-2.1-Turbo
_FILE_ENDING = re.compile(r"\.(safetensors|sft|gguf|ckpt|pth?|bin|json)$", re.IGNORECASE)
_OTHER_CHARACTERS = re.compile(r"[^a-z0-9]+")
_FOLDERS = 4  # levels from a transformer's file up to its release's folder, even in the hub's cache


class Verdict(NamedTuple):
    """Whether a transformer was distilled to few steps, and the evidence."""

    is_distilled: bool
    evidence: str  # the name that shows it, and where it was found


@dataclass(frozen=True)
class KeepingTarget:
    """A way (docs/targets.md) to train on a distilled transformer and preserve its few steps."""

    about: str  # completes "To ...:", for a line above its options
    options: str  # of the training command, as typed
    caching: str = ""  # options that it needs when texts are cached


def make_transfer_target(base: str, file: str) -> KeepingTarget:
    """Return the target that trains a distilled model to learn a LoRA's effect on the base model.

    Args:
        base: The base model.
        file: File of the distilled model.
    """
    lora = "base_lora.safetensors"
    return KeepingTarget(
        f"teach it what a LoRA of {base} changes (write your own paths)",
        f"--network_weights {lora} --teacher dit --teacher_dit {file} --teacher_lora {lora} --teacher_delta "
        "--teacher_weight 1",
    )


GUIDED = KeepingTarget(
    "learn the clips with the guidance that was distilled into it",
    "--guided_target 3 --guided_target_min_timestep 150",
    caching="--empty_prompt",
)

UNDOING = "a LoRA that undoes the distillation"


@dataclass(frozen=True)
class FewSteps:
    """Names of a model's few-step releases, and what to train instead of them or together with them."""

    base: str = "the model that it was made from"  # completes "Train on ..."; "": there is no such model
    also: str = ""  # completes "whose LoRAs work on ... too"
    adapter: str = UNDOING  # completes "pass --training_adapter with ..."; "": there is none
    targets: tuple[KeepingTarget, ...] = (GUIDED,)  # for users who train it anyway, best first
    # complete "The model ...", "Plain training unlearns ..." and "with the trained network ..."
    distillation_clause: str = "was distilled to few steps"
    unlearned_pronoun: str = "them"
    consequence: str = "it needs more steps, and guidance, for equal quality"
    applies_to_all_files: bool = False  # true for all files of the family, whatever their names
    distilled_words: str = ""  # regular expression of further words in names
    # also a regular expression: matching names, "ModelRaw" as "model_raw", belong to the undistilled model
    undistilled_pattern: str = ""

    @property
    def advice_for_lora(self) -> str:
        """Return advice, without the final period, for training a LoRA on the distilled model."""
        if not self.base:
            targets = f"use one of the targets that keep {self.unlearned_pronoun}"
            return f"Pass --training_adapter with {self.adapter}, or {targets}"
        advice = f"Train on {self.base}"
        if self.also:
            advice += f", whose LoRAs work on {self.also} too"
        if self.adapter:
            advice += f", or pass --training_adapter with {self.adapter}"
        return advice

    @property
    def advice_for_full_training(self) -> str:
        """Return advice to users who fine-tune the full distilled model.

        The sentence has no final period.
        """
        if not self.base:
            return "Train a LoRA with one of the targets that keep it: see docs/targets.md"
        return f"Train on {self.base}"

    def judge(self, path: Path, metadata: Mapping[str, str]) -> Verdict | None:
        """Guess from names whether a transformer was distilled; the first conclusive name decides.

        Names are, in this order, the file's own, its folders' if the file's name is generic (such as
        "model"), and the titles in its metadata.

        Args:
            path: The checkpoint.
            metadata: Metadata in the checkpoint's header.

        Returns:
            The verdict; None if no name is conclusive.
        """
        words = "|".join(filter(None, (_WORDS, self.distilled_words)))
        distilled_pattern = re.compile(rf"{_ANYWHERE}|(?<![a-z0-9])(?:{words})(?![a-z0-9])")
        # names that may reveal distillation, nearest first, each with a phrase for messages
        path = path.absolute()
        file_name = _FILE_ENDING.sub("", path.name)
        names = [(file_name, f"its name is {file_name}")]
        is_generic_name = _PLAIN.fullmatch(file_name.lower()) is not None  # such as "model"
        if is_generic_name:
            for folder in path.parents[:_FOLDERS]:
                names.append((folder.name, f"its folder is {folder}"))
        for key in _TITLES:
            if key in metadata:
                names.append((metadata[key], f"its {key} is {metadata[key]}"))
        for name, reason in names:
            separated_name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # "ModelRaw" -> "Model_Raw"
            snake_case_name = _OTHER_CHARACTERS.sub("_", separated_name.lower())
            undistilled = self.undistilled_pattern
            if undistilled and re.search(undistilled, snake_case_name):
                return Verdict(False, reason)
            # guidance distillation, after which guidance is an input of the model, does not count
            without_guidance_words = _GUIDED.sub("", _OTHER_CHARACTERS.sub("_", name.lower()))
            # "de-distilled" contains "distilled": such words are removed before the search
            without_undone_words = _UNDONE.sub("", without_guidance_words)
            if distilled_pattern.search(without_undone_words):
                return Verdict(True, reason)
            if without_undone_words != without_guidance_words:  # "de-distilled" and the like
                return Verdict(False, reason)
        return None
