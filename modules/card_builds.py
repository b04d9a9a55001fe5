"""Choose the build of torch for the card of this machine. Standard library only."""

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.errors import InstallationError
from modules.nvidia_driver import OLDEST_DRIVER, NvidiaCard, find_nvidia_cards

# Cards that each build has code for, by capability. torch 2.13 for CUDA 13.0 begins with Turing, as CUDA 13
# does; torch 2.9 for CUDA 12.6 ends before Blackwell, which came with CUDA 12.8
MIN_CUDA_13_CAPABILITY = (7, 5)
FIRST_BEYOND_CUDA_12_6 = (10, 0)
# AMD cards supported by PyTorch's builds for ROCm 6.4, in Linux's numbers: 110000 is gfx1100
AMD_CARDS = frozenset({90000, 90006, 90008, 90010, 90402, 100300, 110000, 110001, 110002, 120000, 120001})
KFD = Path("/sys/class/kfd/kfd/topology/nodes")  # list of AMD cards, from Linux's driver
NO_TORCH = "there is no build of PyTorch for it. docs/install.md lists the machines"


@dataclass(frozen=True)
class BuildInfo:
    """Disk space of a torch build with all other packages, measured or estimated from its files on Linux."""

    download_gb: float
    disk_gb: float


# the names are those of the extras in pyproject.toml
BUILDS = {
    "cu130": BuildInfo(download_gb=3.3, disk_gb=9),
    "cu126": BuildInfo(download_gb=3.3, disk_gb=9),
    "rocm": BuildInfo(download_gb=5, disk_gb=18),
    "cpu": BuildInfo(download_gb=0.6, disk_gb=3),
    "mac": BuildInfo(download_gb=0.5, disk_gb=3),
}


@dataclass(frozen=True)
class BuildChoice:
    """The name of a build, and the reason for choosing it."""

    build: str
    reason: str


def select_build() -> BuildChoice:
    """Return the torch build for this machine's GPU.

    Raises:
        InstallationError: If no build supports it.
    """
    return select_for(sys.platform, platform.machine(), find_nvidia_cards(), read_amd_cards(KFD))


def select_for(system: str, machine: str, nvidia: Sequence[NvidiaCard], amd: Sequence[int]) -> BuildChoice:
    """Select the build of torch for a machine.

    Args:
        system: Value of `sys.platform`.
        machine: Value of `platform.machine()`.
        nvidia: NVIDIA GPUs of the machine.
        amd: Version numbers of the machine's AMD GPUs, on Linux.

    Raises:
        InstallationError: If no build fits; the message names the installed and the required driver.
    """
    if system == "darwin":
        if machine != "arm64":
            raise InstallationError(f"this is a Mac with an Intel processor: {NO_TORCH}")
        return BuildChoice("mac", "a Mac with an Apple chip")
    if nvidia:
        # The build that supports the machine's newest GPU and runs with the installed driver
        first = nvidia[0]  # all cards share one driver
        card_text = f"{first.name}, driver {first.driver}"
        known_capabilities = [card.capability for card in nvidia if card.capability != (0, 0)]
        newest = max(known_capabilities, default=MIN_CUDA_13_CAPABILITY)
        if newest >= MIN_CUDA_13_CAPABILITY and first.series >= OLDEST_DRIVER[13]:
            return BuildChoice("cu130", card_text)
        needs_cuda_13 = newest >= FIRST_BEYOND_CUDA_12_6
        needed_driver = OLDEST_DRIVER[13] if needs_cuda_13 else OLDEST_DRIVER[12]
        if first.series < needed_driver:
            raise InstallationError(
                f"the NVIDIA driver is {first.driver}, and {first.name} needs {needed_driver} or later here. "
                "Update the driver, or start with --build cpu"
            )
        return BuildChoice("cu126", card_text)
    if system == "linux" and AMD_CARDS.intersection(amd):
        return BuildChoice("rocm", "an AMD card; not tried")
    return BuildChoice("cpu", "no supported GPU was found, so only small models are practical")


def read_amd_cards(nodes: Path) -> list[int]:
    """Return the version numbers of AMD GPUs that the Linux driver lists in a folder; 0 stands for a CPU."""
    versions = []
    for path in sorted(nodes.glob("*/properties")):
        try:
            words = path.read_text(encoding="ascii", errors="replace").split()
        except OSError:
            continue
        info = dict(zip(words[::2], words[1::2], strict=False))
        number = info.get("gfx_target_version", "0")
        versions.append(int(number) if number.isdecimal() else 0)
    return versions
