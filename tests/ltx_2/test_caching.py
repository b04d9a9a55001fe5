"""Caching clips with sound by the command line: work that is shared, tracks of every kind, and damage."""

import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ltx2_cache_latents
from dataset.caching.on_ray import CachingActor
from tests.commands import ROOT, run_in_processes, run_python
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.faults.runs import DYING
from tests.ltx_2.release import TinyRelease, write_release
from tests.sound_media import Track, write_media
from tests.tiny.project import write_dataset

RATE, FRAMES, FPS = 48000, 17, 25


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return write_release(tmp_path_factory.mktemp("model ä"))


def command(release: TinyRelease, config: Path) -> list[object]:
    words = ["--ltx2_checkpoint", release.checkpoint, "--ltx2_mode", "av", "--dataset_config", config]
    return [*words, "--vae_dtype", "float32", "--device", "cpu"]


def write_set(folder: Path, name: str, more: str = "") -> Path:
    """A dataset file of the clips in a folder, whose caches are in one of that name."""
    text = write_dataset(folder, frames=str(FRAMES), batch_size=2, more=more).read_text(encoding="utf-8")
    path = folder / f"{name}.toml"
    path.write_text(text.replace("/cache", f"/{name}"), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")
def test_shared_and_killed_work_gives_the_bytes_of_one_process(release: TinyRelease, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for number, stem in enumerate("abcde"):
        tracks = [Track((0.1 * number,))] if number != 2 else []
        write_media(tmp_path / "clips" / f"{stem}.mp4", *tracks, frames=FRAMES + number)
    script, alone = "ltx2_cache_latents.py", command(release, write_set(tmp_path, "alone"))
    succeed_here(script, *alone, folder=tmp_path)

    for index in (1, 0):
        shares = ["--num_shards", 2, "--shard_index", index]
        succeed_here(script, *command(release, write_set(tmp_path, "shards")), *shares, folder=tmp_path)
    run_in_processes(2, script, *command(release, write_set(tmp_path, "processes")), folder=tmp_path)
    words = [str(word) for word in command(release, write_set(tmp_path, "ray"))]
    rows = CachingActor(ltx2_cache_latents.main, words, True, 2, 1)({"shard_index": [0, 1]})

    killed = command(release, write_set(tmp_path, "killed"))
    done = run_python(DYING, "mid_write", 8, ROOT / script, *killed, folder=tmp_path, check=False)
    left = [path.name for path in (tmp_path / "killed").glob("*_audio.safetensors")]
    succeed_here(script, *killed, folder=tmp_path)

    expected = contents(tmp_path / "alone")
    assert len(expected) == 5 + 4
    assert rows["written"] == [3 + 2, 2 + 2]
    assert (done.returncode, left) == (-9, ["a_00000-017_0032x0032_ltx2_audio.safetensors"])
    for name in ("shards", "processes", "ray", "killed"):
        assert contents(tmp_path / name) == expected, name


LOW = 0.5**0.5  # FFmpeg's share of a middle channel for either side
# name -> tracks of a clip; then the one that is heard, and how loudly: left and right
ODD = {
    "late.mkv": ([Track((0.1,), start=0.2, seconds=0.3, codec="flac")], 0, (1, 1)),
    "short.mkv": ([Track((0.1,), seconds=0.3, codec="flac")], 0, (1, 1)),
    "six.mkv": ([Track((0.3,), layout="5.1", rate=44100, codec="flac", channel=2)], 0, (LOW, LOW)),
    "mono.mkv": ([Track((0.2,), layout="mono", rate=22050, codec="flac")], 0, (1, 1)),
    # Matroska marks its first track as the default one
    "two.mkv": ([Track((0.4,), layout="mono", codec="flac"), Track((0.25,), codec="flac")], 0, (1, 1)),
}


def write_heard(path: Path, track: Track, loud: tuple[float, float]) -> None:
    """A plain WAV file from the first picture on that sounds as a track of a clip should."""
    row = track.samples()
    row = row[np.abs(row).sum(1).argmax()]
    both = np.zeros((round(track.rate * FRAMES / FPS), 2))
    first = round(track.start * track.rate)
    part = row[: len(both) - first]
    both[first : first + len(part)] = part[:, None] * loud
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(track.rate)
        file.writeframes(np.round(both * 32767).astype("<i2").tobytes())


def test_odd_tracks_are_cached_as_they_sound(release: TinyRelease, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "heard").mkdir()
    for name, (tracks, number, loud) in ODD.items():
        path = write_media(tmp_path / "clips" / name, *tracks, frames=FRAMES, fps=FPS)
        write_heard(tmp_path / "heard" / f"{path.stem}.wav", tracks[number], loud)

    script, heard = "ltx2_cache_latents.py", f'audio_directory = "{(tmp_path / "heard").as_posix()}"'
    succeed_here(script, *command(release, write_set(tmp_path, "own")), folder=tmp_path)
    succeed_here(script, *command(release, write_set(tmp_path, "given", heard)), folder=tmp_path)

    ours, theirs = (
        {path.name: load_file(path) for path in sorted((tmp_path / name).glob("*_audio.safetensors"))}
        for name in ("own", "given")
    )
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(ODD)
    for name, tensors in ours.items():
        for key, tensor in tensors.items():
            # half a bit of 16, under a logarithm
            torch.testing.assert_close(tensor, theirs[name][key], atol=0.02, rtol=0, msg=f"{name} {key}")
    found = [next(iter(tensors.values())) for tensors in ours.values()]
    apart = [(one.float() - other.float()).abs().max() for one, other in zip(found, found[1:], strict=False)]
    assert min(apart) > 0.2


def test_damage_is_one_message_and_all_else_is_cached(release: TinyRelease, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    write_media(tmp_path / "clips/silent.mp4", frames=FRAMES)
    path = write_media(tmp_path / "clips/bad.mp4", Track((0.1,), codec="libmp3lame"), frames=FRAMES)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.size]
    data = bytearray(path.read_bytes())
    for start, size in places[2:10]:
        data[start : start + size] = b"\x55" * size
    path.write_bytes(data)
    config = write_set(tmp_path, "cache")

    code, said = run_here("ltx2_cache_latents.py", *command(release, config), folder=tmp_path)

    assert_one_message(code, said, "bad.mp4: its sound is damaged near")
    assert "silent.mp4: it has no track of sound" in said
    assert sorted(contents(tmp_path / "cache")) == [
        f"{stem}_00000-{FRAMES:03d}_0032x0032_ltx2.safetensors" for stem in ("bad", "silent")
    ]
    npz = write_set(tmp_path, "npz", 'cache_format = "npz"')
    code, said = run_here("ltx2_cache_latents.py", *command(release, npz), folder=tmp_path)
    assert_one_message(code, said, 'cache_format = "npz" is for tables of pictures; use "files"')
