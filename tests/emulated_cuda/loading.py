"""Compile and load the emulated device, before torch is imported."""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
ROOT = SOURCE.parent.parent.parent


def library() -> Path:
    """Return where the compiled device for this torch is."""
    version = importlib.metadata.version("torch")
    made_of = SOURCE.read_bytes() + Path(__file__).read_bytes()
    key = hashlib.sha256(made_of + version.encode()).hexdigest()[:16]
    return ROOT / "build" / "emulated_cuda" / f"device-{key}.so"


def compile_it() -> None:
    """Compile the device with g++, which takes about 15 seconds, unless it is there.

    Raises RuntimeError with the compiler's words.
    """
    built, version = library(), importlib.metadata.version("torch")
    if built.exists():
        return
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    built.parent.mkdir(parents=True, exist_ok=True)
    made = built.with_suffix(f".{os.getpid()}.tmp")
    includes = [torch / "include", torch / "include/torch/csrc/api/include"]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", *(f"-I{each}" for each in includes)]
    command += [str(SOURCE), "-o", str(made), f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"]
    done = subprocess.run([*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True, check=False)
    if done.returncode:
        made.unlink(missing_ok=True)
        raise RuntimeError(f"the emulated device was not compiled with torch {version}:\n{done.stderr}")
    made.replace(built)


@functools.cache
def load() -> ctypes.CDLL:
    """Load the compiled device. Raises RuntimeError if torch is imported already: it asks only once."""
    if "torch" in sys.modules:
        raise RuntimeError("the emulated device must be loaded before torch is imported")
    return ctypes.CDLL(str(library()))
