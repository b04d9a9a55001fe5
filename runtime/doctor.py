"""Examine the environment: installed packages, the device, missing packages and what they are needed for."""

import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from modules.errors import InstallationError
from modules.installation import PREFIX, check_requirements, find_namesake, read_requirements
from modules.nvidia_driver import explain_unseen_card
from runtime.machine import GIB

FEW_GB = 60  # required free disk: files and caches of a model with 14 billion weights in 16 bits
INDEX = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Examined:
    """One finding about the environment, and whether Reelsmith can run with it."""

    name: str
    text: str
    is_fit: bool = True


def examine(folder: Path) -> list[Examined]:
    """Return the findings about this environment, one line each.

    Args:
        folder: Folder of models and caches, whose disk is checked.
    """
    python = f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}"
    free_gb = shutil.disk_usage(folder).free / GIB
    hint = ""
    if free_gb < FEW_GB:
        hint = f"; a model of 14 billion weights and its caches need about {FEW_GB} GB"
    return [
        Examined("Python", python),
        *_examine_packages(),
        *_examine_torch(),
        Examined("disk", f"{free_gb:.0f} GB free in {folder}{hint}"),
    ]


def _examine_packages() -> Iterator[Examined]:
    """Yield the findings about the required packages, then about each optional one."""
    try:
        check_requirements()
    except InstallationError as error:
        yield Examined("packages", " ".join(str(error).split()), is_fit=False)
        return
    # Compare the versions of the installed packages with requirements.txt.
    from packaging.requirements import Requirement  # accelerate depends on it

    mismatches = []
    for requirement in map(Requirement, read_requirements()):
        if not _is_there(requirement.name):
            continue
        installed = version(requirement.name)
        if not requirement.specifier.contains(installed, prereleases=True):
            mismatches.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    verdict = "all of requirements.txt, in the versions that it asks for"
    if mismatches:
        remedy = "; these versions are untested: python -m pip install -r requirements.txt"
        verdict = ", ".join(mismatches) + remedy
    yield Examined("packages", verdict, is_fit=not mismatches)
    namesake = find_namesake()
    if namesake is not None:
        # only an installed Reelsmith has files that the other distribution may have replaced
        yield Examined("name", namesake, is_fit=not PREFIX)
    yield Examined("video", f"PyAV {version('av')}; it includes FFmpeg, so no other is needed")
    yield _examine_bitsandbytes()
    yield Examined(
        "browser", "works: `reelsmith browser` opens a page to train, generate and watch by clicks"
    )


def _examine_bitsandbytes() -> Examined:
    if importlib.util.find_spec("bitsandbytes") is not None:
        return Examined("bitsandbytes", f"{version('bitsandbytes')}: optimizers in 8 bits (adamw8bit) work")
    consequence = "missing: --optimizer_type adamw8bit is refused; adamw takes 6 bytes more for each weight"
    remedy = "" if sys.platform == "darwin" else " that learns. python -m pip install bitsandbytes"
    return Examined("bitsandbytes", consequence + remedy)


def _examine_torch() -> Iterator[Examined]:
    """Yield findings about torch, its device, compiler and attention packages; nothing without torch."""
    if importlib.util.find_spec("torch") is None:
        return
    try:
        import torch

        from modules.attention.attend import BACKENDS
        from modules.devices import select_device
        from runtime.compile import missing_for_inductor
    except Exception as error:  # a build for another system raises OSError, a damaged one any error
        verdict = f"cannot be loaded ({type(error).__name__}: {error}). Install it again: {INDEX}"
        yield Examined("torch", verdict, is_fit=False)
        return
    device = select_device(None)
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    yield Examined("torch", f"{torch.__version__}, {build}")
    if device.type == "cuda":
        import torch

        for number in range(torch.cuda.device_count()):
            info = torch.cuda.get_device_properties(number)
            dtype = "bf16" if info.major >= 8 else "fp16 (it computes bf16 slowly)"  # 8: Ampere
            size = f"{info.total_memory / GIB:.0f} GB, capability {info.major}.{info.minor}"
            yield Examined(f"GPU {number}", f"{info.name}, {size}: {dtype}")
    else:
        yield _without_cuda(device.type, explain_unseen_card(torch.__version__, torch.version.cuda))
    missing = missing_for_inductor(device)
    verdict = f"missing {missing}. Without it --compile and --optimized are refused" if missing else "works"
    yield Examined("compile", verdict)
    package_by_backend = {backend.name: backend.module for backend in BACKENDS.values() if backend.module}
    yield _examine_attention(package_by_backend)


def _examine_attention(package_by_backend: Mapping[str, str]) -> Examined:
    """Return the finding about which attention packages are installed."""
    installed = ["torch's own"]
    not_installed: list[str] = []
    for name, package in package_by_backend.items():
        has_package = importlib.util.find_spec(package) is not None
        (installed if has_package else not_installed).append(name)
    verdict = ", ".join(installed)
    if not_installed:
        names = ", ".join(not_installed)
        verdict += f"; not installed: {names}. Their options are refused, torch's own needs none"
    return Examined("attention", verdict)


def _without_cuda(kind: str, reason: str | None) -> Examined:
    """Return the finding for a torch that does not see a CUDA device."""
    if reason is not None:
        return Examined("GPU", reason, is_fit=False)
    if shutil.which("nvidia-smi") is None:
        verdict = "no CUDA device: only small models are trained and sampled in useful time"
        return Examined("GPU", f"{kind}; {verdict}" if kind != "cpu" else verdict)
    verdict = "an NVIDIA driver is installed, but it lists no card: see what nvidia-smi prints"
    return Examined("GPU", verdict, is_fit=False)


def _is_there(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False
