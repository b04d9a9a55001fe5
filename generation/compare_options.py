"""Options of tools/compare.py besides those of the family's generation script. Standard library only."""

import glob
import re
from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option
from modules.text_files import read_safetensors_texts

MOST_COLUMNS = 64


class CompareOptions(Options, title="comparison"):
    """Comparison of every LoRA file at every strength."""

    family: str | None = option("family of the model; default: as the first LoRA says")
    lora: tuple[Path, ...] = option(
        "LoRA files to compare; patterns such as my_lora-*.safetensors", nargs="+", required=True
    )
    lora_high_noise: tuple[Path, ...] | None = option(
        "of models with two experts the LoRA files for --dit_high_noise, as many as for --lora, which then "
        "are for --dit: the first two make the first column, both at the strength of the column",
        nargs="+",
    )
    lora_multiplier: tuple[float, ...] = option(
        "strengths to compare each file at", nargs="+", default=(1.0,)
    )

    def __post_init__(self) -> None:
        if self.lora_high_noise and len(self.lora_high_noise) != len(self.lora):
            raise OptionError(
                f"--lora has {len(self.lora)} files, --lora_high_noise {len(self.lora_high_noise)}: give as "
                "many, the first of each for the first column"
            )
        columns = len(self.lora) * len(self.lora_multiplier) + 1
        if columns > MOST_COLUMNS:
            raise OptionError(
                f"--lora and --lora_multiplier give {columns} columns, {MOST_COLUMNS} are the most. Give "
                "fewer files or strengths."
            )


def expand_patterns(given: tuple[Path, ...], flag: str = "--lora") -> tuple[Path, ...]:
    """Return the files of all patterns, each once, numbers in their names in order.

    Shells of Windows do not expand patterns. Raises OptionError for a pattern or a name without a file.
    """
    found: dict[Path, None] = {}
    for path in given:
        if path.is_file():
            found[path] = None
            continue
        matches = [Path(name) for name in glob.glob(str(path))]  # noqa: PTH207 (of any folder)
        files = sorted((match for match in matches if match.is_file()), key=_natural)
        if not files:
            raise OptionError(f"{flag} {path}: no such file. Give LoRA files or a pattern that fits some.")
        found |= dict.fromkeys(files)
    return tuple(found)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def family_of(path: Path, families: list[str]) -> str:
    """Return the family that a LoRA file's metadata name. Raises OptionError if they name none."""
    said = " ".join(
        _metadata(path).get(key, "") for key in ("ss_base_model_version", "modelspec.architecture")
    )
    words = re.sub(r"[^a-z]", "", said.lower())
    for name in families:
        if name.replace("_", "") in words:
            return name
    raise OptionError(
        f"--lora {path} does not say which model it is for. Give --family: {', '.join(families)}."
    )


def _metadata(path: Path) -> dict[str, str]:
    try:
        return read_safetensors_texts(path)
    except (OSError, ValueError):
        return {}  # reading it as a LoRA says what is wrong
