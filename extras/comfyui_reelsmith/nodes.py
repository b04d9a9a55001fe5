"""Two nodes: queue the training run of a folder with a run.toml, and load its newest samples.

Reelsmith need not be installed in ComfyUI's Python, because the nodes start its command. The command is not a
setting of a node, because a workflow may come from somebody else. The environment variable REELSMITH names
the command or the folder of a checkout; without it, `reelsmith` is searched on the PATH.
"""
# Letters: B images, H height, W width, C = 3 channels

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROGRAM = "REELSMITH"
DESCRIPTION = "run.toml"  # that `reelsmith new` writes
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CLIP_SUFFIXES = (".mp4", ".mkv", ".webm")
MAX_SAMPLES = 64
MAX_LOG_LENGTH = 1500  # characters of a failed command's output in its state


def find_command() -> list[str]:
    """Return the command that starts Reelsmith: a program or, in a checkout, Python and a script.

    Raises:
        RuntimeError: If Reelsmith is not found.
    """
    configured = os.environ.get(PROGRAM)
    if not configured:
        executable = shutil.which("reelsmith")
        if executable is None:
            raise RuntimeError(
                f"the command reelsmith is not on the PATH. Install Reelsmith, or set {PROGRAM} to its "
                "command or to the folder of a checkout, and start ComfyUI again"
            )
        return [executable]
    path = Path(configured).expanduser()
    script = path / "reelsmith.py"
    if script.is_file():
        python = path / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        return [str(python if python.is_file() else sys.executable), str(script)]
    if not path.is_file():
        raise RuntimeError(f"{PROGRAM}={configured}: this is neither a command nor the folder of a checkout")
    return [str(path)]


@dataclass(eq=False)
class QueuedTraining:
    """The training run of a folder, which waits in the queue, is active or has ended."""

    folder: Path
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    is_stopped: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Run `reelsmith run` to its end, which resumes a training run that was stopped."""
        with self.log.open("wb") as log:
            try:
                self.process = subprocess.Popen(
                    [*find_command(), "run", str(self.folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
                if self.is_stopped:  # `stop` was called before there was a process
                    self.stop()
                self.process.wait()
            except (OSError, RuntimeError) as error:
                log.write(str(error).encode())

    def stop(self) -> None:
        """Stop the training run as Ctrl-C does, so that it saves its state; a waiting run does not start."""
        self.is_stopped = True
        if self.process is None or self.process.poll() is not None:
            return
        with contextlib.suppress(OSError):  # it has just ended
            if sys.platform == "win32":
                self.process.send_signal(signal.CTRL_BREAK_EVENT)
            elif signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # ComfyUI was started behind `&`
                os.kill(self.process.pid, signal.SIGTERM)
            else:
                os.killpg(self.process.pid, signal.SIGINT)

    def describe(self) -> str:
        """Return the run's state and the last line of its log; if it failed, the end of the log."""
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").split("\n") if self.log.exists() else []
        )
        last_line = next((line.strip() for line in reversed(lines) if line.strip()), "")
        # a progress bar redraws its line after each carriage return
        last_line = last_line.rpartition("\r")[2]
        if not self.ended.is_set():
            if self.process is None:
                return "waiting"
            return f"{'stopping' if self.is_stopped else 'running'}: {last_line}"
        if self.is_stopped:
            return "stopped"
        if self.process is not None and self.process.returncode == 0:
            return f"finished: {last_line}"
        return "failed:\n" + "\n".join(lines).strip()[-MAX_LOG_LENGTH:]


class TrainingQueue:
    """Lets training runs start one after the other, because they share the GPU."""

    def __init__(self) -> None:
        self._trainings: dict[Path, QueuedTraining] = {}
        self._waiting: list[QueuedTraining] = []
        self._lock = threading.Lock()
        self._is_working = False
        self._logs = tempfile.TemporaryDirectory(prefix="reelsmith-", ignore_cleanup_errors=True)
        atexit.register(self.end)

    def find(self, folder: Path) -> QueuedTraining | None:
        """Return the last training run that was queued for a folder; None if there is none."""
        return self._trainings.get(folder)

    def add(self, folder: Path) -> QueuedTraining:
        """Queue the training run of a folder, unless it is already waiting or active."""
        with self._lock:
            known = self._trainings.get(folder)
            if known is not None and not known.ended.is_set():
                return known
            log = Path(self._logs.name) / f"{len(self._trainings)}.txt"
            training = self._trainings[folder] = QueuedTraining(folder, log if known is None else known.log)
            self._waiting.append(training)
            if not self._is_working:
                self._is_working = True
                threading.Thread(target=self._work, daemon=True).start()
            return training

    def end(self) -> None:
        """Stop all training runs, and wait until they have saved."""
        for training in [*self._trainings.values()]:
            training.stop()
        for training in [*self._trainings.values()]:
            training.ended.wait()

    def _work(self) -> None:
        """Run the waiting training runs until none is left."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_working = False
                    return
                training = self._waiting.pop(0)
            if not training.is_stopped:
                training.run()
            training.ended.set()


QUEUE = TrainingQueue()


def find_folder(text: str) -> Path:
    """Return the training folder that a node's text field names.

    Raises:
        ValueError: If `reelsmith new` has not written a run.toml into it.
    """
    folder = Path(text.strip().strip('"')).expanduser()
    if not folder.is_absolute() or not (folder / DESCRIPTION).is_file():
        raise ValueError(
            f"{text!r} is not a folder that Reelsmith can train: pass the whole path of one with "
            f"{DESCRIPTION}, which `reelsmith new FOLDER` writes"
        )
    return folder.resolve()


def find_samples(folder: Path) -> list[Path]:
    """Return the samples in a training run's folder, the newest first."""
    description = tomllib.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    settings = {**description, **description.get("training", {})}
    samples = (folder / str(settings.get("output_dir", "output")) / "sample").glob("*")
    known = [path for path in samples if path.suffix.lower() in (*IMAGE_SUFFIXES, *CLIP_SUFFIXES)]
    return sorted(known, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def read_frames(path: Path) -> Tensor:
    """Return an image, or the frames of a clip, as a (B, H, W, C) tensor in 0..1."""
    if path.suffix.lower() in CLIP_SUFFIXES:
        import av  # ComfyUI brings it

        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    else:
        from PIL import Image

        with Image.open(path) as image:
            frames = [np.asarray(image.convert("RGB"))]
    return torch.from_numpy(np.stack(frames)).float() / 255


def free_models() -> None:
    """Unload the models that ComfyUI keeps on the GPU, because a training run needs the memory."""
    management = sys.modules.get("comfy.model_management")
    if management is not None:
        management.unload_all_models()
        management.soft_empty_cache()


class ReelsmithRun:
    """Node that queues `reelsmith run FOLDER`, or stops it."""

    CATEGORY = "Reelsmith"
    FUNCTION = "queue"
    OUTPUT_NODE = True  # it runs although nothing shows its results
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("folder", "state")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's names
        """Return the inputs of this node in ComfyUI's format."""
        return {"required": {"folder": ("STRING", {"default": ""}), "action": (["start", "stop"],)}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:  # noqa: N802
        """Return NaN, which never equals the previous value, so that ComfyUI runs the node each time."""
        return float("nan")

    def queue(self, folder: str, action: str) -> tuple[str, str]:
        """Queue or stop the training run of a folder. Returns the folder and the state of its run.

        Raises:
            ValueError: If the folder has no run.toml.
            RuntimeError: If Reelsmith's command is not found.
        """
        path = find_folder(folder)
        if action == "start":
            find_command()  # so that the node itself reports a missing command
            free_models()
            QUEUE.add(path)
        training = QUEUE.find(path)
        if training is None:
            return str(path), "not queued"
        if action == "stop":
            training.stop()
        return str(path), training.describe()


class ReelsmithSamples:
    """Node that loads a training run's newest samples: images of one size, or the newest clip's frames."""

    CATEGORY = "Reelsmith"
    FUNCTION = "load"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("samples", "state")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs of this node in ComfyUI's format."""
        count = ("INT", {"default": 4, "min": 1, "max": MAX_SAMPLES})
        return {"required": {"folder": ("STRING", {"default": ""}), "count": count}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:  # noqa: N802
        """Return NaN, which never equals the previous value, so that ComfyUI runs the node each time."""
        return float("nan")

    def load(self, folder: str, count: int) -> tuple[Tensor, str]:
        """Return a run's samples as a (B, H, W, C) tensor in 0..1, the newest first, and the run's state.

        Args:
            folder: Path of a folder with a run.toml.
            count: Maximum number of images. If the newest sample is a clip, all of its frames are returned.

        Raises:
            ValueError: If the folder has no run.toml.
            RuntimeError: If there are no samples yet.
        """
        path = find_folder(folder)
        training = QUEUE.find(path)
        state = "not queued" if training is None else training.describe()
        samples = find_samples(path)
        if not samples:
            raise RuntimeError(f"{path} has no samples yet. Its training: {state}")
        newest = read_frames(samples[0])
        images = [newest]
        if samples[0].suffix.lower() in IMAGE_SUFFIXES:
            for sample in samples[1:count]:
                image = read_frames(sample)
                if image.shape[1:] == newest.shape[1:]:  # a batch has one size
                    images.append(image)
        return torch.cat(images), state


NODE_CLASS_MAPPINGS = {"ReelsmithRun": ReelsmithRun, "ReelsmithSamples": ReelsmithSamples}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ReelsmithRun": "Reelsmith: run a training",
    "ReelsmithSamples": "Reelsmith: samples",
}
