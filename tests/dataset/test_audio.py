"""Clips with sound: from the file over its cache to a batch, for a family that hears."""

import shutil
import tarfile
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest

from data_tools.report.check import check_training
from dataset.batches.finding import FoundItems, find_items, require_items
from dataset.batches.items import NO_COMMANDS, group_items
from dataset.batches.reading import read_batch
from dataset.batches.starting import compare_sources
from dataset.cache.converting import files_to_shards, shards_to_files
from dataset.cache_files import read_entry, write_tensors
from dataset.caching.loop import cache_media, cache_texts
from dataset.caching.on_ray import CachingActor
from dataset.caching.prefetch import CacheReport, estimate_decoded_bytes
from dataset.config import DatasetConfig, load_dataset_config, with_audio_files
from dataset.listing import find_sources
from dataset.sources import audio
from dataset.sources.decoding import decode_source
from dataset.sources.media_source import MediaSource
from modules.errors import CacheError, DatasetError
from modules.media.samples import read_track
from protocols.data import AUDIO_LATENTS, FPS, HAS_AUDIO, AudioSpec
from tests.dataset.cache.killing import needs_fork, run_to_step
from tests.dataset.caching.test_shards import entries, into, main_of, shard
from tests.dataset.making import make_image, make_table
from tests.dataset.sound_toy import PER_LATENT, RATE, HearingToy, audio_shape
from tests.dataset.toy_family import LATENT, ToyFamily, options
from tests.sound_media import Track, clicks_in, write_media

PLAIN = replace(LATENT, in_sections=False)
CLICKS = tuple(number / 25 for number in (3, 13, 23, 33, 43))  # where these frames begin


def hearing(**changes: Any) -> HearingToy:
    return HearingToy(**{"latent": PLAIN, **changes})


def make_set(folder: Path, **changes: Any) -> DatasetConfig:
    """A table of the clips in a folder, with captions."""
    settings = {"resolution": (32, 32), "target_frames": (9,), "caption_extension": ".txt"} | changes
    for path in folder.iterdir():
        if path.suffix in (".mp4", ".mkv"):
            path.with_suffix(".txt").write_text(f"clip {path.stem}", encoding="utf-8")
    return DatasetConfig(folder / "data.toml", (make_table(folder, **settings),))


def cache(config: DatasetConfig, family: Any = None, **changes: Any) -> CacheReport:
    return cache_media(family or hearing(), config, options(**changes))


def find(config: DatasetConfig, family: Any = None) -> FoundItems:
    cache_texts(family or hearing(), config, options())
    return find_items(config, "toy", PLAIN, audio=(family or hearing()).audio)


def caches(folder: Path) -> list[str]:
    found = (folder / "cache").glob("*_audio.safetensors")
    return sorted(path.name.removesuffix("_toy_audio.safetensors") for path in found)


@pytest.mark.parametrize(
    ("keys", "spans"),
    [
        ({"target_frames": (17, 45)}, [(0, 17), (0, 45)]),
        ({"target_frames": (21,), "frame_extraction": "chunk"}, [(0, 21), (21, 21)]),
        ({"target_frames": (41,), "frame_extraction": "slide", "frame_stride": 7}, [(0, 41), (7, 41)]),
        ({"frame_extraction": "full", "max_frames": 45}, [(0, 45)]),
    ],
)
def test_the_sound_of_every_span_is_that_of_its_frames_and_is_read_once(
    tmp_path: Path, keys: dict[str, Any], spans: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def read(*args: Any, **facts: Any) -> Any:
        calls.append(args)
        return read_track(*args, **facts)

    monkeypatch.setattr(audio, "read_track", read)
    write_media(tmp_path / "clip.mp4", Track(CLICKS))
    family, config = hearing(), make_set(tmp_path, **keys)

    report = cache(config, family)

    assert len(calls) == 1
    assert report.written == 2 * len(spans)
    assert caches(tmp_path) == [f"clip_{start:05d}-{count:03d}_0032x0032" for start, count in spans]
    for (start, count), samples in zip(sorted(spans), family.heard, strict=True):
        assert samples.shape == (1, 2, count * RATE // 25)
        exact = [round((click * 25 - start) * RATE / 25) for click in CLICKS]
        exact = [place for place in exact if 0 <= place < samples.shape[2]]
        for row in samples[0]:
            off = [abs(place - one) for place, one in zip(clicks_in(row), exact, strict=True)]
            assert max(off) <= 1


@pytest.mark.parametrize(
    ("rate", "keys", "fps", "frame"),
    [
        (16, {}, 16, 10),
        (32, {"source_fps": 32.0}, 16, 5),  # every second frame is dropped
        (32, {"source_fps": "auto"}, 16, 5),
        (8, {"source_fps": 8.0}, 8, 10),  # none is doubled
        (8, {"source_fps": "auto"}, 16, 20),
    ],
)
def test_sound_keeps_its_speed_whatever_becomes_of_the_frames(
    tmp_path: Path, rate: float, keys: dict[str, Any], fps: float, frame: int
) -> None:
    """A click at the 10th frame of the file."""
    write_media(tmp_path / "clip.mp4", Track((10 / rate,), seconds=50 / rate), fps=rate)
    family, config = hearing(), make_set(tmp_path, target_frames=(21,), **keys)

    cache(config, family)

    (samples,) = family.heard
    assert samples.shape[2] == round(21 / fps * RATE)
    assert [round(place * fps / RATE) for place in clicks_in(samples[0, 1])] == [frame]
    (name,) = caches(tmp_path)
    entry = read_entry(tmp_path / "cache" / f"{name}_toy.safetensors")
    assert entry.tensors[FPS] == fps
    heard = read_entry(tmp_path / "cache" / f"{name}_toy_audio.safetensors")
    length = audio_shape(21, fps)[1]
    assert list(heard.named) == [f"audio_latents_{length}x{PER_LATENT}x2_float32", "audio_lengths_int32"]
    assert heard.tensors["audio_lengths"] == length


def test_sound_is_cached_again_when_target_fps_changes(tmp_path: Path) -> None:
    """The same frames by number last half as long at twice the rate."""
    write_media(tmp_path / "clip.mp4", Track(CLICKS, seconds=4), fps=32)
    for fps in (8.0, 16.0):
        family = hearing()

        report = cache(make_set(tmp_path, source_fps="auto", target_fps=fps), family)

        assert report.written == 2
        assert [samples.shape[2] for samples in family.heard] == [round(9 / fps * RATE)]


def test_sound_at_another_speed_than_its_frames_is_refused(tmp_path: Path) -> None:
    """The user says that the clip is slower than its file: what is heard would not be what is seen."""
    write_media(tmp_path / "clip.mp4", Track(CLICKS), fps=24)
    config = make_set(tmp_path, source_fps=16.0)
    (one,) = cache(config).silent
    assert "24 frames per second, but source_fps says 16" in one.reason
    assert caches(tmp_path) == []
    (failure,) = cache(make_set(tmp_path, source_fps=16.0, audio="required")).failures
    assert 'audio = "required" needs it' in failure.reason
    assert cache(make_set(tmp_path, source_fps=23.976)).silent == ()


def test_sound_of_files_in_a_folder_takes_the_place_of_the_clips_own(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "ton ä").mkdir()
    for stem in "abc":
        write_media(tmp_path / f"clips/{stem}.mp4", Track((0.04,)))
    write_media(tmp_path / "ton ä/a.wav", Track((0.12,), codec="pcm_s16le"), frames=0)
    write_media(tmp_path / "ton ä/b.mkv", Track((0.2,)))
    family = hearing()
    config = make_set(tmp_path / "clips", audio_directory=tmp_path / "ton ä")

    report = cache(config, family)

    assert [[round(p / RATE * 25) for p in clicks_in(one[0, 0])] for one in family.heard] == [[3], [5]]
    assert [failure.path.name for failure in report.silent] == ["c.mp4"]
    assert (find(config).items[0].has_cached_audio, find(config).items[2].has_cached_audio) == (True, False)
    # the clip's own track instead: the other sound is stale
    own = make_set(tmp_path / "clips")
    with pytest.raises(CacheError, match="made from a file of audio_directory"):
        read_batch(find(own).items[:1], PLAIN)
    assert (cache(own).written, cache(own).reused) == (3, 6)
    shutil.copy(tmp_path / "ton ä/a.wav", tmp_path / "ton ä/a.flac")
    with pytest.raises(DatasetError, match="sound of the same clip. Keep one"):
        cache(config)


def test_latents_with_sound_are_not_trained_on_if_a_table_now_ignores_it(tmp_path: Path) -> None:
    """And the reverse; for models whose latent caches contain the sound."""
    write_media(tmp_path / "clip.mp4", Track((0.04,)))
    family = hearing(latent=replace(PLAIN, caches_audio=True))
    assert family.audio is not None
    family.audio = replace(family.audio, is_in_latent_cache=True)
    heard, ignored = make_set(tmp_path), make_set(tmp_path, audio="ignore")
    cache_texts(family, heard, options())
    for made, changed, how in ((heard, ignored, "with"), (ignored, heard, "without")):
        assert cache(made, family).written == 1
        assert len(read_batch(find_items(made, "toy", PLAIN).items, PLAIN)) == 1

        with pytest.raises(CacheError, match=f"it was made {how} the audio of its clip"):
            read_batch(find_items(changed, "toy", PLAIN).items, PLAIN)


@pytest.mark.parametrize("folder", ["sounds", None], ids=["folder", "next to the clips"])
def test_sound_of_files_that_the_caching_command_names_is_trained_on(
    tmp_path: Path, folder: str | None
) -> None:
    """The training command has no such option."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "sounds").mkdir()
    write_media(tmp_path / "clips/a.mp4", Track((0.04,)))
    sounds = None if folder is None else tmp_path / folder
    write_media((sounds or tmp_path / "clips") / "a.wav", Track((0.12,), codec="pcm_s16le"), frames=0)
    config = make_set(tmp_path / "clips")

    report = cache(with_audio_files(config, "--audio_source", sounds))

    assert report.written == 2
    batch = read_batch(find(config).items, PLAIN)
    assert AUDIO_LATENTS in batch.tensors
    assert cache(with_audio_files(config, "--audio_source", sounds)).written == 0
    assert cache(config).written == 1  # of the clip's own track


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_list_names_sound_by_audio_path(tmp_path: Path, suffix: str) -> None:
    clip = write_media(tmp_path / "clip.mp4", Track((0.04,)))
    other = write_media(tmp_path / "x.flac", Track((0.12,), codec="flac"), frames=0)
    if suffix == "jsonl":
        text = f'{{"video_path": "{clip}", "caption": "a", "audio_path": "{other}"}}\n'
    else:
        text = f"video_path,caption,audio_path\n{clip},a,{other}\n"
    (tmp_path / f"list.{suffix}").write_text(text, encoding="utf-8")
    key = "video_jsonl_file" if suffix == "jsonl" else "video_table_file"
    (tmp_path / "data.toml").write_text(
        f"[[datasets]]\n{key} = '{tmp_path / f'list.{suffix}'}'\nresolution = [32, 32]\n"
        f"target_frames = [9]\ncache_directory = '{tmp_path / 'cache'}'\n",
        encoding="utf-8",
    )
    family, config = hearing(), load_dataset_config(tmp_path / "data.toml")

    cache(config, family)

    assert [round(place / RATE * 25) for place in clicks_in(family.heard[0][0, 0])] == [3]


def test_clips_in_tars_have_sound_and_their_names_in_reasons(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        for stem, tracks in {"a": [Track((0.04,))], "b": []}.items():
            tar.add(write_media(tmp_path / f"{stem}.mp4", *tracks), f"{stem}.mp4")
    (tmp_path / "data.toml").write_text(
        f"[[datasets]]\nvideo_tars = '{tmp_path / 'clips.tar'}'\nresolution = [32, 32]\n"
        f"target_frames = [9]\ncache_directory = '{tmp_path / 'cache'}'\n",
        encoding="utf-8",
    )

    report = cache(load_dataset_config(tmp_path / "data.toml"))

    assert caches(tmp_path) == ["a_00000-009_0032x0032"]
    place = tmp_path / "clips.tar" / "b.mp4"
    assert [one.reason for one in report.silent] == [f"{place}: it has no audio track"]


def test_sounds_without_pictures_take_the_memory_of_one_picture(tmp_path: Path) -> None:
    """And what cannot be learned of them is told by name."""
    bells, clips = tmp_path / "bells", tmp_path / "clips"
    unmatched = AudioSpec(RATE, 2, audio_shape, audio_only=True)
    family = hearing(audio=unmatched, media_identity={"vae": "sound alone"})
    for folder in (bells, clips):
        folder.mkdir()
    for name, seconds in (("long", 2.0), ("short", 0.03)):
        write_media(bells / f"{name}.wav", Track(seconds=seconds, codec="pcm_s16le"), frames=0)
    with wave.open(str(bells / "empty.wav"), "wb") as empty:
        empty.setparams((1, 2, RATE, 0, "NONE", ""))
    changes = {"frame_extraction": "uniform", "frame_sample": 2, "target_frames": (9,), "target_fps": None}
    table = make_table(bells, "audio_directory", **changes)
    report = cache(DatasetConfig(bells / "data.toml", (table,)), family)
    assert [one.stem for one in report.failures] == ["empty", "short"]
    assert "is empty, or does not state its duration" in str(report.failures[0])
    assert "its audio is shorter than a frame, 0.062 s" in str(report.failures[1])
    assert caches(bells) == ["long_00000-009_0064x0064", "long_00023-009_0064x0064"]
    long = MediaSource(bells / "long.wav", "long", None, None, (), table)
    assert decode_source(long, 16.0).frames.strides[0] == 0 < estimate_decoded_bytes(long)

    for name, tracks in (("loud", [Track((0.04,), seconds=0.5)]), ("quiet", [])):
        write_media(clips / f"{name}.mp4", *tracks, frames=9)
    make_image(clips / "p.png")
    config = make_set(clips)
    cache(config)
    report = cache(config, family)  # latents of another VAE only hold a place
    assert (report.written, report.reused) == (0, 3)
    assert [str(one) for one in report.failures] == [
        f"{clips / 'quiet.mp4'}: it has no audio track; only audio is learned"
    ]
    for refused, why in (({"audio": "ignore"}, "leaves none"), ({"kind": "image"}, "it has images")):
        with pytest.raises(DatasetError, match=f"this run trains audio only, and .*{why}"):
            cache(make_set(clips, **refused), family)
    with pytest.raises(
        DatasetError, match=r"has no sounds but 2 videos, for which the key is video_directory"
    ):
        find_sources(make_table(clips, "audio_directory"))


def test_caches_of_sound_change_their_form_with_the_others(tmp_path: Path) -> None:
    write_media(tmp_path / "clip.mp4", Track((0.04,)))
    config = make_set(tmp_path)
    cache(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}

    files_to_shards(tmp_path / "cache")

    assert not list((tmp_path / "cache").glob("*.safetensors"))
    shards = make_set(tmp_path, cache_format="shards")
    assert (cache(shards).reused, cache(shards).written) == (2, 0)
    with pytest.raises(DatasetError, match="Convert the existing caches"):
        cache(config)
    shards_to_files(tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before


def test_each_half_is_made_again_only_for_its_own_reasons(tmp_path: Path) -> None:
    (tmp_path / "sound").mkdir()
    (tmp_path / "clips").mkdir()
    for stem in "ab":
        write_media(tmp_path / f"clips/{stem}.mp4", Track((0.04,)))
        write_media(tmp_path / f"sound/{stem}.wav", Track((0.1,), codec="pcm_s16le"), frames=0)
    config = make_set(tmp_path / "clips", audio_directory=tmp_path / "sound")

    def again(config: DatasetConfig = config, **changes: Any) -> tuple[int, int, int, int]:
        """Frames and sound that were encoded, entries that were kept and removed."""
        family = hearing(**changes)
        report = cache(config, family)
        return sum(map(len, family.seen)), len(family.heard), report.reused, report.removed

    assert again(audio=None) == (2, 0, 0, 0)  # a run without sound
    assert again() == (0, 2, 2, 0)  # turning it on encodes sound alone
    assert again() == (0, 0, 4, 0)
    assert again(audio_identity={"audio_vae": "second"}) == (0, 2, 2, 0)
    assert again() == (0, 2, 2, 0)
    write_media(tmp_path / "sound/a.wav", Track((0.2,), codec="pcm_s16le", seconds=1.5), frames=0)
    assert again() == (0, 1, 3, 0)
    assert again(media_identity={"vae": "second"}) == (2, 0, 2, 0)
    write_media(tmp_path / "clips/a.mp4", Track((0.04,)), frames=40)
    assert again(media_identity={"vae": "second"}) == (1, 1, 2, 0)
    silent = make_set(tmp_path / "clips", audio_directory=tmp_path / "sound", audio="ignore")
    assert again(silent, media_identity={"vae": "second"}) == (0, 0, 4, 0)
    (tmp_path / "sound/a.wav").unlink()
    assert again(media_identity={"vae": "second"}) == (0, 0, 3, 1)
    (tmp_path / "clips/b.mp4").unlink()
    (tmp_path / "sound/b.wav").rename(tmp_path / "sound/a.wav")
    assert again(media_identity={"vae": "second"}) == (0, 1, 1, 2)
    assert cache(replace(config), ToyFamily(latent=PLAIN)).written == 1  # of one that never hears


def test_damaged_entries_are_made_again_and_foreign_ones_unless_they_are_asked_for(tmp_path: Path) -> None:
    write_media(tmp_path / "clip.mp4", Track((0.04,)))
    config = make_set(tmp_path)
    cache(config)
    (path,) = (tmp_path / "cache").glob("*_audio.safetensors")
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)

    with pytest.raises(CacheError, match="audio.safetensors: damaged.*\n.*caching script --verify"):
        read_batch(find(config).items, PLAIN)
    assert cache(config).written == 1
    assert read_batch(find(config).items, PLAIN).tensors[HAS_AUDIO].tolist() == [True]
    write_tensors(path, read_entry(path).named, {"architecture": "toy"})
    assert cache(config, skip_existing=True).num_without_record == 1
    assert cache(config).written == 1


def test_damaged_sound_is_a_failure_of_its_clip_alone(tmp_path: Path) -> None:
    for stem in "ab":
        write_media(tmp_path / f"{stem}.mp4", Track((0.04,), codec="libmp3lame", rate=44100))
    path = tmp_path / "a.mp4"
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.size]
    data = bytearray(path.read_bytes())
    for start, size in places[2:10]:
        data[start : start + size] = b"\x55" * size
    path.write_bytes(data)
    config = make_set(tmp_path)

    report = cache(config)

    (failure,) = report.failures
    assert "a.mp4: its sound is damaged" in failure.reason
    assert caches(tmp_path) == ["b_00000-009_0032x0032"]
    assert report.written == 3


@pytest.mark.parametrize("form", ["files", "shards"])
def test_a_mixed_batch_has_zeros_where_a_clip_is_silent(tmp_path: Path, form: str) -> None:
    write_media(tmp_path / "a.mp4", Track((0.04,)))
    write_media(tmp_path / "b.mp4")
    write_media(tmp_path / "c.mp4", Track((0.2,)), fps=16)
    write_media(tmp_path / "d.mp4", fps=16)
    config = make_set(tmp_path, batch_size=4, cache_format=form)
    cache(config)

    found = require_items(find(config))
    batches = [read_batch(items, PLAIN) for items in group_items(found).values()]

    assert [batch.keys for batch in batches] == [
        tuple(f"{stem}_00000-009_0032x0032_toy" for stem in stems) for stems in ("ab", "cd")
    ]
    for batch, fps in zip(batches, (25, 16), strict=True):
        heard = batch.tensor(AUDIO_LATENTS)
        assert heard.shape == (2, *audio_shape(9, fps))
        assert batch.tensor(HAS_AUDIO).tolist() == [True, False]
        assert batch.tensor(FPS).tolist() == [1000 * fps] * 2
        assert not batch.tensor(FPS).is_floating_point()  # it stays on the host
        assert heard[0].any()
        assert not heard[1].any()
        assert {made.part for made in batch.cache_origins} == {"latents", "sound", "t5"}
    silent = read_batch(found[1:2], PLAIN).tensors
    assert not {AUDIO_LATENTS, HAS_AUDIO} & silent.keys()
    ignored = make_set(tmp_path, batch_size=4, cache_format=form, audio="ignore")
    assert not {AUDIO_LATENTS, HAS_AUDIO} & read_batch(find(ignored).items[:2], PLAIN).tensors.keys()
    required = find(make_set(tmp_path, cache_format=form, audio="required"))
    with pytest.raises(CacheError, match=r"(?s)but 2 clips have no sound.*such as b_.*caching script"):
        require_items(required)


def make_mixed_set(folder: Path, form: str) -> DatasetConfig:
    """Clips of which every second one is silent; batches of latents have two of them."""
    for number, stem in enumerate("abcde"):
        tracks = [] if number % 2 else [Track((0.04 * (number + 1),))]
        write_media(folder / f"{stem}.mp4", *tracks, frames=9)
    return make_set(folder, batch_size=2, cache_format=form)


@needs_fork
@pytest.mark.parametrize("form", ["files", pytest.param("shards", marks=pytest.mark.slow)])
def test_a_run_killed_at_any_step_goes_on_to_the_same_bytes(tmp_path: Path, form: str) -> None:
    """It replaces the sound of another VAE and both halves of a clip that changed; one clip is gone."""
    config, before = make_mixed_set(tmp_path, form), into(make_mixed_set(tmp_path, form), tmp_path / "before")
    shutil.copy(tmp_path / "a.mp4", tmp_path / "gone.mp4")
    cache(make_mixed_set(tmp_path, form), hearing(audio_identity={"audio_vae": "second"}))
    cache(before, hearing(audio_identity={"audio_vae": "second"}))
    (tmp_path / "gone.mp4").unlink()
    write_media(tmp_path / "e.mp4", Track((0.3,)), frames=9)
    undisturbed = into(config, tmp_path / "undisturbed")
    cache(undisturbed)
    expected, step, is_done = entries(undisturbed), 0, False

    while not is_done:
        step += 1
        killed = into(config, tmp_path / str(step))
        shutil.copytree(tmp_path / "before", tmp_path / str(step))
        is_done = run_to_step(lambda killed=killed: cache(killed) and None, step)  # type: ignore[misc]
        assert expected.keys() <= entries(killed).keys()  # what is replaced is there before or after
        cache(killed)
        assert entries(killed) == expected

    assert step > 5


def test_shards_and_actors_together_give_the_sound_of_a_single_run(tmp_path: Path) -> None:
    config = make_mixed_set(tmp_path, "shards")
    full, shared, by_actor = (into(config, tmp_path / name) for name in ("whole", "shared", "by actor"))
    cache(full)

    reports = [cache(shared, shard=shard(index, 3)) for index in (2, 0, 1)]
    actor = CachingActor(main_of(hearing(), by_actor), ("--words",), True, 3, 1)
    rows = actor({"shard_index": [1, 0, 2]})

    assert entries(shared) == entries(by_actor) == entries(full)
    assert sum(report.written for report in reports) == sum(rows["written"]) == 5 + 3
    assert sum(len(report.silent) for report in reports) == 2
    for one in (shared, by_actor):
        report = cache(one)
        assert (report.written, report.reused, report.removed) == (0, 8, 0)


def test_sound_that_is_cached_leaves_the_encoders_of_pictures_loaded(tmp_path: Path) -> None:
    config = make_mixed_set(tmp_path, "files")
    cache(config)
    for path in tmp_path.rglob("*_toy.safetensors"):
        path.unlink()
    family: Any = hearing()
    loaded = list[str]()
    load = family.media_encoders
    family.media_encoders = lambda *given: loaded.append("pictures") or load(*given)
    family.audio_networks = lambda *given, **_: loaded.append("sound")
    actor = CachingActor(main_of(family, config), ("--words",), True, 3, 1)
    assert sum(actor({"shard_index": [0, 1, 2]})["written"]) == 5
    assert loaded == ["pictures"]


def test_sound_that_a_kill_left_out_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By a training and by its --check; a clip without sound is no fault of caching."""
    for name in "ab":
        write_media(tmp_path / f"{name}.mp4", Track(CLICKS))
    write_media(tmp_path / "silent.mp4")
    config = make_set(tmp_path)
    cache(config)
    said = "1 clip with sound that is not cached, such as {}: only their pictures are learned"

    def told() -> tuple[bool, bool]:
        caplog.clear()
        compare_sources(config.datasets, find(config), NO_COMMANDS, "toy", trains_audio=True)
        checked = "\n".join(check_training(config, "toy", PLAIN, audio=hearing().audio).lines)
        words = said.format(tmp_path / "a.mp4")
        return words in caplog.text, "a.mp4" in checked and "has sound that is not cached" in checked

    assert told() == (False, False)
    for path in (tmp_path / "cache").glob("a_*_audio.safetensors"):
        path.unlink()
    assert told() == (True, True)
    cache(config)
    assert told() == (False, False)
