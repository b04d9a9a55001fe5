"""Describe this machine and its packages for bug reports, without names of people, folders or computers.

Standard library only; torch is imported if it is installed.
"""

import importlib.util
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from modules.installation import PREFIX, ROOT
from modules.nvidia_driver import find_nvidia_cards
from modules.version import VERSION

GIB = 1 << 30
PACKAGES = (
    *("accelerate", "transformers", "safetensors", "av", "bitsandbytes", "triton", "triton-windows"),
    *("flash-attn", "sageattention", "xformers"),
)
MAX_NAME = 60  # characters of a GPU's name
PATIENCE = 20.0  # timeout for git, in seconds
_VERSION = re.compile(r"\d+(?:\.\d+)*(?:(?:a|b|rc|\.post|\.dev)\d+)*")
_BUILD = re.compile(r"\+(?:cpu|xpu|cu\d+|rocm[\d.]+)")  # of torch; a custom build may have any text here


@dataclass(frozen=True)
class MachineGpu:
    """A GPU that torch uses."""

    name: str
    memory_bytes: int
    capability: str  # compute capability: 8.9


@dataclass(frozen=True)
class SharedMachine:
    """This machine and what is installed. Texts are versions and product names, "" if unknown."""

    reelsmith: str
    commit: str  # "" outside a clone
    is_changed: bool  # whether files of the clone differ from its commit
    python: str
    system: str  # Linux, Linux in WSL, Windows 11, Darwin
    processor: str  # x86_64, arm64
    cores: int
    host_bytes: int  # 0: unknown
    torch: str
    cuda: str
    driver: str  # of NVIDIA
    gpus: tuple[MachineGpu, ...]
    packages: dict[str, str]  # version by name


def describe_machine() -> SharedMachine:
    """Return the description of this machine. It contains no environment variables and no paths."""
    torch_version, cuda, gpus = _describe_torch()
    commit = _ask_git("rev-parse", "HEAD")
    commit = commit if re.fullmatch(r"[0-9a-f]{40,64}", commit) else ""
    return SharedMachine(
        reelsmith=VERSION,
        commit=commit[:12],
        is_changed=bool(commit and _ask_git("status", "--porcelain", "--untracked-files=no")),
        python=clean_version(platform.python_version()),
        system=_describe_system(),
        processor=clean_name(platform.machine()),
        cores=os.cpu_count() or 0,
        host_bytes=_count_host_bytes(),
        torch=torch_version,
        cuda=cuda,
        driver=next((clean_version(card.driver) for card in find_nvidia_cards()), ""),
        gpus=gpus,
        packages={name: package_version for name in PACKAGES if (package_version := _find_version(name))},
    )


def list_shared_lines(info: SharedMachine) -> list[str]:
    """Return five lines that describe a machine, for a report that is shared."""
    commit = f", commit {info.commit}" if info.commit else ""
    changed = " with changes" if info.is_changed else ""
    cards = [f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GB, capability {gpu.capability}" for gpu in info.gpus]
    memory = f", {info.host_bytes / GIB:.0f} GB of memory" if info.host_bytes else ""
    packages = [f"{name} {package_version}" for name, package_version in info.packages.items()]
    return [
        f"Reelsmith {info.reelsmith}{commit}{changed}",
        f"Python {info.python} on {info.system} {info.processor}, {info.cores} cores{memory}",
        _describe_torch_and_cuda(info),
        f"GPU: {'; '.join(cards) or 'none'}",
        f"Packages: {', '.join(packages) or 'none of those that matter'}",
    ]


def _describe_torch_and_cuda(info: SharedMachine) -> str:
    """Return the line with the versions of torch, CUDA and the NVIDIA driver."""
    driver = f", driver {info.driver}" if info.driver else ""
    if not info.torch:
        cuda = f", CUDA {info.cuda}" if info.cuda else ""
        return f"torch is not installed{cuda}{driver}"
    cuda = f"CUDA {info.cuda}" if info.cuda else "without CUDA"
    return f"torch {info.torch}, {cuda}{driver}"


def lacks_bfloat16() -> bool:
    """Return whether an NVIDIA GPU is older than Ampere: on those torch emulates bfloat16, which is slow."""
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability() < (8, 0)


def clean_version(text: str) -> str:
    """Return the version number at the start of a text, without a private build's suffix; "" if none."""
    found = _VERSION.match(text)
    return found[0] if found else ""


def clean_name(text: str) -> str:
    """Return a product's name without characters that a path or an address would need."""
    return re.sub(r"[^A-Za-z0-9 ()_-]", "", text)[:MAX_NAME].strip()


def _describe_system() -> str:
    """Return the operating system's name; its full version string is left out, as it may contain any text."""
    name, release = platform.system(), platform.release()
    if name == "Windows":
        return clean_name(f"{name} {clean_version(release)}")
    return f"{name} in WSL" if "microsoft" in release.lower() else clean_name(name)


def _describe_torch() -> tuple[str, str, tuple[MachineGpu, ...]]:
    """Return the versions of torch and of its CUDA, and the GPUs."""
    if importlib.util.find_spec("torch") is None:
        return "", "", ()
    try:
        import torch
    except Exception:  # a damaged installation raises any error; `doctor` reports it
        return "", "", ()
    number = clean_version(torch.__version__)
    build = _BUILD.match(torch.__version__, len(number))  # such as +cu130, after the version number
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        capability = f"{card.major}.{card.minor}"
        gpus.append(MachineGpu(clean_name(card.name), int(card.total_memory), capability))
    return number + (build[0] if build else ""), clean_version(torch.version.cuda or ""), tuple(gpus)


def _find_version(distribution: str) -> str:
    try:
        return clean_version(version(distribution))
    except PackageNotFoundError:
        return ""


def _count_host_bytes() -> int:
    if importlib.util.find_spec("psutil") is None:
        return 0
    import psutil  # installed with accelerate

    return int(psutil.virtual_memory().total)


def _ask_git(*words: str) -> str:
    """Return what git prints about this clone; "" if this is not a clone, or git is missing or fails."""
    if PREFIX or not (ROOT / ".git").exists():
        return ""
    try:
        completed = subprocess.run(
            ["git", "-C", str(ROOT), *words],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return completed.stdout.strip() if completed.returncode == 0 else ""
