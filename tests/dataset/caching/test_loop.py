import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.report.check import check_caching
from dataset.batches.finding import find_items
from dataset.batches.reading import read_batch
from dataset.cache.records import latent_record, record_metadata
from dataset.cache_files import read_entry, write_tensors
from dataset.caching import planning, text_plans
from dataset.caching.loop import cache_media, cache_texts
from dataset.caching.prefetch import CacheReport, Failure, conclude, failure_error
from dataset.config import DatasetConfig
from modules.errors import CacheError, DatasetError
from tests.dataset.making import make_clip, make_image, make_table
from tests.dataset.toy_family import LATENT, ToyFamily, ToyText, options
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[3]


def make_config(folder: Path, *, clips: tuple[int, ...] = (9, 9), **changes: Any) -> DatasetConfig:
    """Clips of these numbers of frames, with captions."""
    settings = {"resolution": (32, 32), "target_frames": (5,), "caption_extension": ".txt"} | changes
    for index, frames in enumerate(clips):
        if not (folder / f"clip_{index}.mp4").exists():
            make_clip(folder / f"clip_{index}.mp4", frames)
            (folder / f"clip_{index}.txt").write_text(f"clip number {index}", encoding="utf-8")
    return DatasetConfig(folder / "data.toml", (make_table(folder, **settings),))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").iterdir())


def write_foreign(folder: Path, name: str, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    """A cache file of another program. name: without its suffix."""
    path = folder / "cache" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, tensors, {"architecture": "toy", **metadata})
    return path


def change(config: DatasetConfig, **changes: Any) -> DatasetConfig:
    return dataclasses.replace(
        config, datasets=tuple(table.with_values(**changes) for table in config.datasets)
    )


def test_clips_become_files_of_the_known_format(tmp_path: Path) -> None:
    report = cache_media(ToyFamily(), make_config(tmp_path), options())

    assert names(tmp_path) == [f"clip_{index}_00000-005_0032x0032_toy.safetensors" for index in range(2)]
    entry = read_entry(tmp_path / "cache" / names(tmp_path)[0])
    assert report.written == 2
    assert list(entry.named) == ["latents_2x4x4_bfloat16"]
    metadata = {key: value for key, value in entry.metadata.items() if not key.startswith("reelsmith")}
    assert metadata == {
        "architecture": "toy",
        "width": "32",
        "height": "32",
        "format_version": "1.0.1",
        "frame_count": "5",
    }


def test_caches_beside_the_clips_and_names_of_any_script_do_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "мои видео ü 1"
    folder.mkdir()
    make_clip(folder / "clip à_2_wan.v1 .mp4", 9)
    (folder / "clip à_2_wan.v1 .txt").write_text("日本", encoding="utf-8")
    before = sorted(path.name for path in folder.iterdir())
    config = make_config(folder, clips=(), cache_directory=folder)

    for written in (1, 0):
        assert cache_media(ToyFamily(), config, options()).written == written
        assert cache_texts(ToyFamily(), config, options()).written == written

    made = {"clip à_2_wan.v1 _00000-005_0032x0032_toy.safetensors", "clip à_2_wan.v1 _toy_te.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*before, "data.toml", *made}


def test_files_of_items_that_are_gone_are_removed_unless_kept(tmp_path: Path) -> None:
    config = make_config(tmp_path, target_frames=(5, 9))
    cache_media(ToyFamily(), config, options())
    user = {"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}
    write_foreign(tmp_path, "my_00000-009_0032x0032_toy", user)
    write_foreign(tmp_path, "clip_9_00000-009_0032x0032_hv", {"latents_1x1x1_float32": torch.zeros(1)})
    left = tmp_path / "cache" / ".clip_0_00000-005_0032x0032_toy.safetensors.ab12cd34.tmp"
    left.write_bytes(b"left by a kill")
    os.utime(left, (0, 0))
    narrower = change(config, target_frames=(5,))

    assert cache_media(ToyFamily(), narrower, options(keep_cache=True)).removed == 0
    assert cache_media(ToyFamily(), narrower, options()).removed == 2
    assert names(tmp_path) == [
        "clip_0_00000-005_0032x0032_toy.safetensors",
        "clip_1_00000-005_0032x0032_toy.safetensors",
        "clip_9_00000-009_0032x0032_hv.safetensors",
        "my_00000-009_0032x0032_toy.safetensors",
    ]


def test_a_clip_that_is_too_short_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    conclude(cache_media(ToyFamily(), make_config(tmp_path, clips=(9, 3)), options()))

    assert "clip_1.mp4: 3 frames, the shortest of target_frames is 5" in caplog.text


@pytest.mark.parametrize(
    ("cache", "family", "said"),
    [
        (cache_media, ToyFamily(value=float("inf")), r"clip_0\w+.*: \d+ of \d+ values of latents are NaN or"),
        (
            cache_texts,
            ToyFamily(text=[ToyText(bad="clip number 0")]),
            "clip_0: 12 of 12 values of t5 are NaN",
        ),
    ],
)
def test_values_that_are_nan_or_infinite_are_refused_by_name(
    tmp_path: Path, cache: Callable[..., Any], family: ToyFamily, said: str
) -> None:
    with pytest.raises(CacheError, match=said):
        cache(family, make_config(tmp_path), options())
    assert not list((tmp_path / "cache").glob("clip_0*"))


@pytest.mark.parametrize("cache", [cache_media, cache_texts])
def test_a_damaged_file_is_made_again(tmp_path: Path, cache: Callable[..., Any]) -> None:
    config = make_config(tmp_path)
    cache(ToyFamily(), config, options())
    first, second = (tmp_path / "cache" / name for name in names(tmp_path))
    first.write_bytes(first.read_bytes()[:-3])
    data = bytearray(second.read_bytes())
    data[-1] ^= 4  # one bit of the last value
    second.write_bytes(data)
    assert cache(ToyFamily(), config, options()).written == 2
    assert cache(ToyFamily(), config, options()).reused == 2


@pytest.mark.parametrize("form", ["files", "shards"])
def test_of_thousands_only_headers_and_files_are_compared_and_nothing_is_missed(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MANY", 2)
    monkeypatch.setattr(text_plans, "MANY", 2)
    seen: list[str] = []  # whose latents were compared key by key
    compare = planning.SourcePlanner.plan
    monkeypatch.setattr(
        planning.SourcePlanner, "plan", lambda self: seen.append(self.source.stem) or compare(self)
    )

    def cached(config: DatasetConfig, family: ToyFamily, half: Any = cache_media) -> tuple[int, int, int]:
        seen.clear()
        report = half(dataclasses.replace(family, seen=[]), config, options(num_workers=1))
        return report.written, report.reused, len(seen)

    config, family = make_config(tmp_path, clips=(9, 9, 9, 9), cache_format=form), ToyFamily()
    assert cached(config, family) == (4, 0, 4)
    assert cached(config, family, cache_texts) == (4, 0, 0)
    assert cached(config, family, cache_texts) == (0, 4, 0)
    assert cached(config, family) == (0, 4, 1)
    assert cached(change(config, source_fps=24.1), family) == (4, 0, 4)
    assert cached(config, family) == (4, 0, 4)
    os.utime(tmp_path / "clip_0.mp4")  # a copy without its time
    assert cached(config, family) == (0, 4, 1)
    make_clip(tmp_path / "clip_1.mp4", 12)
    assert cached(config, family) == (1, 3, 2)
    said = '{"a": "\\b"}, [c], "caption": "clip number 2", "crc32": {} é\u2028'
    (tmp_path / "clip_2.txt").write_text(said, encoding="utf-8")
    assert cached(config, family, cache_texts) == (1, 3, 0)
    assert cached(config, family, cache_texts) == (0, 4, 0)
    assert cached(change(config, trigger_word="x"), family, cache_texts) == (4, 0, 0)
    assert cached(config, family, cache_texts) == (4, 0, 0)
    other = dataclasses.replace(family, text=[ToyText(identity={"t5": "second"})])
    assert cached(config, other, cache_texts) == (4, 0, 0)
    assert cached(change(config, target_frames=(5, 9)), family) == (4, 4, 4)
    assert cached(config, family) == (0, 4, 4)  # with more files than are wanted
    assert cached(config, family) == (0, 4, 1)
    masks = tmp_path / "masks"
    masks.mkdir()
    make_image(masks / "clip_3.png")
    assert cached(change(config, mask_directory=masks), family) == (1, 3, 2)
    assert cached(config, family) == (1, 3, 2)
    assert cached(config, dataclasses.replace(family, media_identity={"vae": "second"})) == (4, 0, 4)
    if form == "files":
        file = tmp_path / "cache" / "clip_3_00000-005_0032x0032_toy.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
        assert cached(config, dataclasses.replace(family, media_identity={"vae": "second"})) == (1, 3, 2)


def test_of_thousands_of_clips_each_is_asked_for_its_frames_if_caches_do_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MANY", 2)
    config = make_config(tmp_path, clips=(9, 9, 13), target_frames=(9,), frame_extraction="head")
    assert cache_media(ToyFamily(), config, options(num_workers=1)).written == 3

    longer = change(config, target_frames=(9, 13))
    report = cache_media(ToyFamily(), longer, options(num_workers=1, skip_existing=True))

    assert (report.written, report.reused) == (1, 3)


@pytest.mark.parametrize("frames", [10**12, "9"])
def test_a_record_of_impossible_frames_counts_as_damaged(tmp_path: Path, frames: Any) -> None:
    config = make_config(tmp_path, clips=(9,))
    cache_media(ToyFamily(), config, options())
    path = tmp_path / "cache" / names(tmp_path)[0]
    entry = read_entry(path)
    record = latent_record(entry)
    assert record is not None
    assert record.clip is not None
    clip = dataclasses.replace(record.clip, kept_frames=frames)
    changed = record_metadata(dataclasses.replace(record, clip=clip))
    write_tensors(path, entry.named, {**entry.metadata, **changed})

    with pytest.raises(CacheError, match="damaged, its record cannot be read"):
        latent_record(read_entry(path))
    assert cache_media(ToyFamily(), config, options()).written == 1


def test_skip_existing_keeps_files_of_other_programs_whose_size_or_caption_is_right(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for index, (width, caption) in enumerate(((4, "clip number 0"), (6, "an older text"))):
        tensors = {f"latents_2x4x{width}_bfloat16": torch.zeros(2, 2, 4, width)}
        write_foreign(tmp_path, f"clip_{index}_00000-005_0032x0032_toy", tensors)
        text = {"varlen_t5_bfloat16": torch.ones(3, 4)}
        write_foreign(tmp_path, f"clip_{index}_toy_te", text, caption1=caption)

    for half in (cache_media, cache_texts):
        report = half(ToyFamily(), config, options(skip_existing=True))
        assert (report.reused, report.num_without_record, report.written) == (1, 1, 1)
        assert half(ToyFamily(), config, options()).written == 1  # without the option it has no record


def test_each_encoder_adds_to_the_file_and_keeps_what_others_wrote(tmp_path: Path) -> None:
    config = make_config(tmp_path, clips=(5,))
    mask = {"clipL_mask": torch.ones(3)}
    path = write_foreign(tmp_path, "clip_0_toy_te", mask, note="mine", caption1="clip number 0")
    llm = ToyText(name="llm", variable_length=frozenset({"llm"}), identity={"llm": "one"})
    cache_texts(ToyFamily(text=[ToyText(), llm]), config, options())
    entry = read_entry(path)
    assert set(entry.tensors) == {"t5", "llm", "clipL_mask"}
    assert entry.metadata["note"] == "mine"
    changed = ToyFamily(text=[ToyText(), dataclasses.replace(llm, identity={"llm": "two"}, calls=[])])
    assert (cache_texts(changed, config, options()).written, changed.text[0].calls) == (1, [])


PROCESS = """
import logging, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.dataset.caching.test_loop import make_config
from tests.dataset.toy_family import ToyFamily, options
from dataset.caching import planning, text_plans
from dataset.caching.loop import cache_media, cache_texts
from dataset.caching.prefetch import conclude
folder, family = Path({folder!r}), ToyFamily()
config = make_config(folder, clips=(9, 9, 9, 9, 9))
report = cache_media(family, config, options())
texts = cache_texts(family, config, options())
print(len(family.seen), len(family.text[0].calls), report.written, report.removed, texts.written)
"""


@pytest.mark.parametrize("gone", [0, 2])
def test_the_sections_of_a_clip_are_made_together(
    tmp_path: Path, gone: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = make_config(tmp_path, clips=(5,), fp_latent_window_size=2)

    def written(config: DatasetConfig) -> int:
        return cache_media(ToyFamily(sections=3), config, options()).written

    assert written(config) == 3
    next((tmp_path / "cache").glob(f"clip_0_00000-005-000{gone}_*")).unlink()
    assert written(config) == 3
    left = ", ".join(str(section) for section in range(3) if section != gone)
    assert f"sections {left} were found, 3 files belong together" in caplog.text
    assert written(config) == 0
    assert written(change(config, fp_latent_window_size=9)) == 3
    assert "fp_latent_window_size was 2, is now 9" in caplog.text


@pytest.mark.slow
def test_processes_share_the_work_and_one_cleans_up_when_all_are_done(tmp_path: Path) -> None:
    make_config(tmp_path, clips=(9, 9, 9, 9, 9))
    stale = {"latents_2x4x4_bfloat16": torch.zeros(2, 2, 4, 4)}
    write_foreign(tmp_path, "gone_00000-005_0032x0032_toy", stale)
    code = PROCESS.format(root=str(ROOT), folder=str(tmp_path))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=PATIENCE)[0].split() for process in running]
    assert [output[:2] for output in outputs] == [["3", "3"], ["2", "2"]]  # of 5 each
    assert all(output[2:] == ["5", "1", "5"] for output in outputs)
    assert len(names(tmp_path)) == 10


def test_a_table_that_cannot_be_cached_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    family = ToyFamily(refuses="it is no good")
    with pytest.raises(DatasetError, match=r"data\.toml, \[\[datasets\]\] 1 .*: it is no good"):
        cache_media(family, config, options())
    assert (family.loaded, family.seen, (tmp_path / "cache").exists()) == (0, [], False)
    assert "it is no good" in "\n".join(check_caching(family, config, 1, False).lines)


def test_sections_of_other_programs_are_as_long_as_the_window(tmp_path: Path) -> None:
    table = make_table(tmp_path, fp_latent_window_size=2)
    make_clip(tmp_path / "a.mp4", 5)
    write_foreign(tmp_path, "a_toy_te", {"varlen_t5_float16": torch.ones(4, 4)}, caption1="a text")
    for section, frames in enumerate((2, 9)):
        tensors = {f"latents_{frames}x4x4_float16": torch.ones(2, frames, 4, 4)}
        write_foreign(tmp_path, f"a_00000-017-000{section}_0032x0032_toy", tensors)
    good, bad = find_items(DatasetConfig(table.config_path, (table,)), "toy", LATENT).items
    assert read_batch([good], LATENT).tensor("latents").shape == (1, 2, 2, 4, 4)
    with pytest.raises(CacheError, match="shape 2x9x4x4, .* needs 2x2x4x4"):
        read_batch([bad], LATENT)


def test_of_many_failures_the_first_are_named() -> None:
    said = str(
        failure_error([Failure(Path("m.png"), f"no {number}", 0, "") for number in range(60_000)], "sources")
    )

    assert said.startswith("60000 of the sources could not be used")
    assert "no 199\n  ... and 59800 more\n" in said
    assert "no 200" not in said


@pytest.mark.parametrize(("goes_on", "code"), [("", 1), ("1", 4)])
def test_only_run_sees_that_sources_alone_failed(
    goes_on: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REELSMITH_RUN_GOES_ON", goes_on)
    with pytest.raises(DatasetError) as caught:
        conclude(CacheReport(failures=(Failure(Path("m.png"), "no", 0, ""),)))
    assert caught.value.exit_code == code


class Broken(ToyFamily):
    def encode_media(self, encoders: Any, media: Any) -> Any:
        raise RuntimeError("out of luck")


def test_an_error_ends_the_threads_that_decode_ahead_at_once(tmp_path: Path) -> None:
    config = make_config(tmp_path, clips=(9,) * 8)
    with pytest.raises(RuntimeError, match="out of luck") as held:
        cache_media(Broken(), config, options())
    assert held.traceback  # whose frames are those of the caching
    assert [one.name for one in threading.enumerate() if one.name.startswith(("ahead", "writer"))] == []


def test_caches_of_another_kind_are_told_before_they_are_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path)
    cache_media(ToyFamily(), config, options())
    next((tmp_path / "cache").glob("*.safetensors")).write_bytes(b"damaged")
    with caplog.at_level("INFO"):
        cache_media(ToyFamily(), config, options())
    assert "1 sources had outdated cache files" in caplog.text
    assert "replaces" not in caplog.text
    other = ToyFamily()
    other.media_identity = {**other.media_identity, "image": "i2v"}
    cache_media(other, config, options())
    (told,) = [one.getMessage() for one in caplog.records if "replaces" in one.message]
    assert told.startswith("2 sources have cache files of another kind, which this command replaces.")
    assert "image was None, is now i2v" in told
