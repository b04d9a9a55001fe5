"""A disk that fills up: one clear message, what was there before stays whole, and the same command continues
once there is room.

Two kinds: a real small file system, where the system lets an ordinary user mount one; and a limit on the size
of a file, which fails in the middle of a write and works wherever there are POSIX limits.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dataset.cache import commands
from tests.commands import ROOT, run_python
from tests.faults.messages import assert_one_message, run_here
from tests.faults.run_limited import NO_MOUNT
from tests.faults.runs import (
    Scripts,
    Undisturbed,
    assert_same_caches,
    assert_same_end,
    assert_whole,
    copy_data,
    visible_files,
)
from tests.waiting import wait_for

PAGE = 4096  # bytes in which such a file system gives room
QUALITY = ("--codec", "prores")  # its videos are far larger than their latents
LIMITED = Path(__file__).resolve().parent / "run_limited.py"
# command, folder that is on the full disk, working folder
RunFull = Callable[[Sequence[object], Path, Path], tuple[int, str]]


def run_limited(
    kind: str, size: int, command: Sequence[object], folder: Path, *disk: Path
) -> tuple[int, str]:
    """Run a command with `run_limited.py`; return its exit code and what it wrote to standard error."""
    script, *arguments = command
    words = [LIMITED, kind, size, *disk, ROOT / str(script), *arguments]
    done = run_python(*words, folder=folder, check=False)
    if done.returncode == NO_MOUNT:
        pytest.skip("this system lets no ordinary user mount a file system")
    return done.returncode, done.stderr


def small_disk(free_bytes: int) -> RunFull:
    """Run on a file system with so much room beside what lies there.

    A volume has to keep 1 MiB free beyond each file.
    """

    def run(command: Sequence[object], disk: Path, folder: Path) -> tuple[int, str]:
        disk.mkdir(parents=True, exist_ok=True)
        used = sum(-(-path.stat().st_size // PAGE) * PAGE for path in disk.rglob("*"))
        after = disk.with_name(f"{disk.name} after")
        ended = run_limited("disk", used + free_bytes, command, folder, disk, after)
        shutil.rmtree(disk)
        after.rename(disk)
        return ended

    return run


def small_files(size_bytes: int) -> RunFull:
    """Run where no file may be larger than that."""
    pytest.importorskip("resource")
    return lambda command, disk, folder: run_limited("file", size_bytes, command, folder)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in visible_files(folder)}


def hidden(folder: Path) -> list[Path]:
    """What was left under temporary names."""
    found = [path for path in folder.rglob("*") if path.name.startswith(".")]
    return [path for path in found if path.name != commands.NAME]  # how the caches were made


@pytest.mark.parametrize(
    ("what", "full"),
    [("cache_latents", small_disk(1 << 20)), ("cache_texts", small_files(2000))],
    ids=["latents, disk", "texts, file"],
)
def test_caching_on_a_full_disk(
    what: str, full: RunFull, scripts: Scripts, project: Path, tmp_path: Path
) -> None:
    config = copy_data(project, tmp_path, cached=True)
    for stem in ("clip 1", "clip 4"):
        for path in (tmp_path / "cache").glob(f"{stem}_*"):
            path.unlink()
    before = contents(tmp_path / "cache")

    code, said = full([*getattr(scripts, what), "--dataset_config", config], tmp_path / "cache", project)

    assert_one_message(code, said, str(tmp_path / "cache" / "clip 1_"))
    assert contents(tmp_path / "cache") == before
    assert not hidden(tmp_path / "cache")
    for again in (scripts.cache_latents, scripts.cache_texts):
        assert run_here(*again, "--dataset_config", config, folder=project)[0] == 0
    assert_same_caches(tmp_path / "cache", project / "cache")


@pytest.mark.slow_cases("wan-file")
@pytest.mark.parametrize("what", ["disk", "file"])
def test_training_on_a_full_disk(
    what: str, scripts: Scripts, project: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """There is room for a LoRA, and not for its optimizer's state or for the second state."""
    size = (undisturbed.output / "x.safetensors").stat().st_size
    full = small_disk(1_700_000) if what == "disk" else small_files(size * 3 // 2)
    output = tmp_path / "out"
    command = [*scripts.train, "--output_dir", str(output)]

    code, said = full(command, output, project)

    assert_one_message(code, said, str(output))
    assert_whole(output)
    assert (output / "x-step00000003.safetensors").exists()
    wait_for(lambda: not hidden(output), lambda: str(hidden(output)))  # its page has a process of its own
    assert run_here(*command, folder=project)[0] == 0
    assert_whole(output)
    assert_same_end(output, undisturbed.output)


def test_latents_outlive_a_disk_that_is_full_of_their_video(
    scripts: Scripts, project: Path, tmp_path: Path
) -> None:
    output, disk = tmp_path / "made", tmp_path / "disk"
    generate = [scripts.generate_script, *scripts.models, *QUALITY]
    small = ["--prompt", "a cat", "--seed", "1", "--video_size", "64", "64", "--infer_steps", "1"]
    command = [*generate, *scripts.longer, *small, "--save_path", str(output)]
    code, said = small_files(24 << 10)(command, output, project)

    assert_one_message(code, said, str(output))
    assert not hidden(output)
    (latents,) = output.glob("*_latent.safetensors")
    assert not list(output.glob("*[0-9].mkv"))

    decode = [*generate, "--latent_path", str(latents), "--save_path", str(disk)]
    code, said = small_disk(24 << 10)(decode, disk, project)

    assert_one_message(code, said, str(disk))
    assert not visible_files(disk)
    assert not hidden(disk)
    assert run_here(*decode, folder=project)[0] == 0
    assert [path.suffix for path in visible_files(disk)] == [".mkv"]
