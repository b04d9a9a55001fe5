"""What tools/diagnose.py and tools/profile_blocks.py have written about a LoRA file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.pages.language import say
from modules.text_files import parse_json, read_text

FOLDER = "blocks"  # next to the LoRA file: what was measured, prompts and presets
MAX_ROWS = 1000
MAX_COLUMNS = 100
# sentences for findings, by id: %(figure)s is the measured value, %(subject)s what it is about. Findings
# without one are shown as the command writes them
SENTENCES = {
    "lora-texts-only": say("%(subject)s changes only how the text is read, not what is drawn."),
    "lora-empty": say("%(figure)s of the modules of %(subject)s change nothing."),
    "lora-one-block": say("%(figure)s of the whole change is in %(subject)s."),
    "loras-loud": say("%(subject)s changes the weights %(figure)s times as far as the other LoRA."),
    "loras-overlap": say("In %(subject)s, the changes of both LoRAs have a cosine of %(figure)s."),
    "lora-rounded": say("Only %(figure)s of the change of %(subject)s is left in bf16 weights."),
    "loras-rounded": say("%(subject)s loses %(figure)s of its change if the other LoRA is merged too."),
}
IN_PERCENT = ("lora-empty", "lora-one-block", "lora-rounded", "loras-rounded")
# what follows from them, and what changes it
REMEDIES = {
    "lora-texts-only": say(
        "It can only choose among what the model draws already. Train without "
        "--network_train_text_encoder_only, and without include_patterns and exclude_patterns in "
        "--network_args."
    ),
    "lora-empty": say(
        "These modules were not trained: compare --learning_rate and --network_args of the run with them."
    ),
    "lora-one-block": say(
        "A single block distorts pictures before the others have learned. Weaken it here, or train with a "
        "lower --learning_rate."
    ),
    "loras-loud": say(
        "The other one is hardly seen beside it. Use --lora_multiplier below 1 for the louder one."
    ),
    "loras-overlap": say(
        "They overshoot, or cancel each other if it is negative. Lower --lora_multiplier of both."
    ),
    "lora-rounded": say("Merge with --lora_rounding auto, the default here, which keeps it on average."),
    "loras-rounded": say("Merge with --lora_rounding auto or stochastic, or load one of the two unmerged."),
}


@dataclass(frozen=True)
class ShownFinding:
    """A finding of tools/diagnose.py as the page shows it."""

    id: str
    subject: str
    text: str  # a sentence with the figure
    remedy: str  # what follows, and the option or command that changes it
    block: str = ""  # block that a button can weaken; "" if it is about something else


@dataclass(frozen=True)
class ShownDiagnosis:
    """What tools/diagnose.py found out about a LoRA file."""

    findings: Sequence[ShownFinding]
    remarks: Sequence[str]
    norms: Mapping[str, float]  # norm of the change of each block


@dataclass(frozen=True)
class ProfileRow:
    """A block in a profile."""

    block: str
    norm: float | None
    shares: Sequence[float]  # of the effect of the LoRA, by noise level
    shares_of_frames: Sequence[float]


@dataclass(frozen=True)
class Profile:
    """What tools/profile_blocks.py measured."""

    sigmas: Sequence[float]  # noise level of each column
    changes: Sequence[float]  # change of the prediction by the whole LoRA
    frames: Sequence[int]  # latent frames of a clip; empty for images
    rows: Sequence[ProfileRow]
    prompts: Sequence[str]

    @property
    def largest(self) -> float:
        """The largest share, which has the strongest color."""
        return max(
            (share for row in self.rows for share in (*row.shares, *row.shares_of_frames)), default=0.0
        )


def diagnosis_path(lora: Path) -> Path:
    """Return the path of the findings about a LoRA file."""
    return lora.parent / FOLDER / f"{lora.stem}-diagnosis.json"


def profile_path(lora: Path) -> Path:
    """Return the path of the profile of a LoRA file."""
    return lora.parent / FOLDER / f"{lora.stem}-profile.json"


def is_outdated(path: Path, lora: Path) -> bool:
    """Return whether a LoRA file was written after what was measured."""
    try:
        return path.stat().st_mtime_ns < lora.stat().st_mtime_ns
    except OSError:
        return False


def read_diagnosis(lora: Path) -> ShownDiagnosis | None:
    """Return the findings about a LoRA file; None if there are none, or if another program wrote them."""
    try:
        content = parse_json(read_text(diagnosis_path(lora)))
        findings = [_show_finding(row) for row in list(content["findings"])[:MAX_ROWS]]
        remarks = [str(remark) for remark in list(content["remarks"])[:MAX_ROWS]]
        norms = {str(row["block"]): _number(row["norm"]) for row in list(content["blocks"])[:MAX_ROWS]}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return ShownDiagnosis(findings, remarks, norms)


def _show_finding(row: Mapping[str, Any]) -> ShownFinding:
    """Return a finding in the words of the page, or in those of the command if the page has none."""
    id, subject, figure = str(row["id"]), str(row["subject"]), _number(row["figure"])
    text, remedy = str(row["text"]), f"{row['meaning']} {row['remedy']}"
    if id in SENTENCES:
        shown = f"{figure:.0%}" if id in IN_PERCENT else f"{figure:.2f}"
        text = say(SENTENCES[id], figure=shown, subject=subject)
        remedy = REMEDIES[id]
    return ShownFinding(id, subject, text, remedy, block=subject if id == "lora-one-block" else "")


def read_profile(lora: Path) -> Profile | None:
    """Return the profile of a LoRA file; None if there is none, or if another program wrote it."""
    try:
        content = parse_json(read_text(profile_path(lora)))
        sigmas = _numbers(content["sigmas"])
        frames = [int(frame) for frame in list(content["frames"])[:MAX_COLUMNS]]
        rows = [
            ProfileRow(
                str(row["block"]),
                norm=None if row["norm"] is None else _number(row["norm"]),
                shares=_numbers(row["shares"])[: len(sigmas)],
                shares_of_frames=_numbers(row["shares_of_frames"])[: len(frames)],
            )
            for row in list(content["blocks"])[:MAX_ROWS]
        ]
        prompts = [str(prompt) for prompt in list(content["prompts"])[:MAX_ROWS]]
        return Profile(sigmas, _numbers(content["changes"]), frames, rows, prompts)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _numbers(values: Any) -> list[float]:
    return [_number(value) for value in list(values)[:MAX_COLUMNS]]


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number
