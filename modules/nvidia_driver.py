"""List the cards of the NVIDIA driver, and explain why torch does not see them. Standard library only."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# first number of CUDA's version -> oldest series of the driver that runs it. Source: NVIDIA, CUDA
# Compatibility, "Minor Version Compatibility", table 1
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
QUERY = "--query-gpu=name,driver_version,compute_cap"
PATIENCE = 30.0  # seconds; the first query after a boot may initialize the cards


@dataclass(frozen=True)
class NvidiaCard:
    """An NVIDIA GPU, as its driver describes it."""

    name: str
    driver: str  # version of the driver: 580.65.06
    capability: tuple[int, int]  # compute capability, such as (8, 9); (0, 0) if unknown

    @property
    def series(self) -> int:
        """Driver series: 535 for version 535.104.05."""
        return int(self.driver.partition(".")[0])


def find_nvidia_cards() -> list[NvidiaCard]:
    """Return the GPUs that the NVIDIA driver lists; none if no driver answers."""
    program = shutil.which("nvidia-smi")
    if program is None and os.name == "nt":  # older drivers install it outside of PATH
        folder = Path(os.environ.get("PROGRAMFILES", r"C:\Program Files"))
        program = shutil.which("nvidia-smi", path=str(folder / "NVIDIA Corporation" / "NVSMI"))
    if program is None:
        return []
    try:
        completed = subprocess.run(
            [program, QUERY, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return read_nvidia_cards(completed.stdout)


def read_nvidia_cards(text: str) -> list[NvidiaCard]:
    """Parse the driver's list of NVIDIA GPUs; skip lines in a different format."""
    cards = []
    for line in text.splitlines():
        name, *cells = [cell.strip() for cell in line.rsplit(",", 2)]
        if len(cells) != 2 or not cells[0].partition(".")[0].isdecimal():
            continue
        major, _, minor = cells[1].partition(".")
        known = major.isdecimal() and minor.isdecimal()
        cards.append(NvidiaCard(name, cells[0], (int(major), int(minor)) if known else (0, 0)))
    return cards


def explain_unseen_card(torch_version: str, cuda: str | None) -> str | None:
    """Return why torch has no CUDA device although the driver lists a GPU; None if it lists none.

    Args:
        torch_version: `torch.__version__`.
        cuda: `torch.version.cuda`, which is None for builds without CUDA.
    """
    cards = find_nvidia_cards()
    if not cards:
        return None
    card = cards[0]
    if cuda is None:
        return (
            f"there is an NVIDIA card ({card.name}), but torch {torch_version} is a build without CUDA. "
            "Install the build for the card: docs/install.md"
        )
    needed = OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    build = f"torch {torch_version} with CUDA {cuda}"
    if card.series < needed:
        return (
            f"the NVIDIA driver is {card.driver}, and {build} needs {needed} or later. Update the driver, or "
            "install a build for an older one: docs/install.md"
        )
    return (
        f"the driver {card.driver} lists {card.name}, but {build} sees no device. Look at "
        "CUDA_VISIBLE_DEVICES, and restart the machine if the driver was updated"
    )
