"""Dataset configurations: defaults, look-up order, and errors that say what to change."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataset.cache.store import Stores
from dataset.caching.planning import LatentCacheSettings
from dataset.config import KEYS, MODES, DatasetTable, for_family, load_dataset_config
from dataset.config_keys import FRAMES, LATENTS, LEARNING, REFERENCES, SECTIONS, TEXTS
from dataset.forms.cogvideox_lists import CogVideoXTensors
from dataset.forms.composing import FORMAT_KEYS, SOURCES
from dataset.sources.frames import find_bucket, spans
from dataset.sources.media_source import MediaSource
from dataset.subset_options import ANYWHERE, DATASET, SUBSET, SUBSET_KEYS
from dataset.table import Augmentation, CaptionChanges, list_fields
from modules.errors import DatasetError
from modules.media.lengths import ClipLengths
from tests.commands import ROOT
from tests.dataset.making import make_format_keys, make_table
from tests.dataset.toy_family import LATENT


def write(folder: Path, text: str, name: str = "data.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def tables(folder: Path, text: str) -> tuple[DatasetTable, ...]:
    return load_dataset_config(write(folder, text)).datasets


def test_an_image_table_has_the_documented_defaults(tmp_path: Path) -> None:
    (table,) = tables(tmp_path, '[[datasets]]\nimage_directory = "pics"')

    nothing = (None, "", False, frozenset())
    values = {field.name: table.value_of(field.name) for field in list_fields()}
    found = {name: value for name, value in values.items() if value not in nothing}
    assert found == {
        "config_path": tmp_path / "data.toml",
        "kind": "image",
        "directory": Path("pics"),
        "cache_directory": Path("pics"),
        "cache_format": "files",
        "resolution": (960, 544),
        "batch_size": 1,
        "num_repeats": 1,
        "prior_loss_weight": 1.0,
        "network_multiplier": 1.0,
        "audio": "if_present",
        "target_frames": (1,),
        "frame_extraction": "head",
        "frame_stride": 1,
        "frame_sample": 1,
        "max_frames": 129,
        "fp_latent_window_size": 9,
        "keyframe_guide_frame_idx": -1,
        "keyframe_guide_strength": 1.0,
        "latent_idx_guide_strength": 1.0,
        "reads_listed_controls": True,
        "changes": CaptionChanges(),
        "augmentation": Augmentation(),
    }


def test_the_table_goes_before_general_before_the_default(tmp_path: Path) -> None:
    first, second = tables(
        tmp_path,
        """
        [general]
        resolution = 512
        batch_size = 2
        caption_extension = ".txt"
        [[datasets]]
        image_directory = "a"
        batch_size = 3
        [[datasets]]
        video_directory = "b"
        resolution = [960, 544]
        """,
    )

    assert (first.buckets.resolution, first.learning.batch_size, first.captions.caption_extension) == (
        (512, 512),
        3,
        ".txt",
    )
    assert (second.buckets.resolution, second.learning.batch_size, second.captions.caption_extension) == (
        (960, 544),
        2,
        ".txt",
    )


def test_a_hundred_problems_are_named_and_the_others_counted(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        load_dataset_config(write(tmp_path, "[[datasets]]\nnum_repeats = 0\n" * 300))

    first, *lines, last = str(error.value).splitlines()
    assert first.endswith("data.toml cannot be used:")
    assert len(lines) == 100
    assert last == "  ... and 200 more"


def test_json_has_the_same_structure_and_null_counts_as_absent(tmp_path: Path) -> None:
    content = {
        "general": {"batch_size": None, "resolution": [64, 48]},
        "datasets": [
            {"video_directory": "v", "image_directory": None, "cache_directory": "c", "target_frames": [1, 9]}
        ],
    }

    (table,) = load_dataset_config(write(tmp_path, json.dumps(content), "data.json")).datasets

    assert (table.kind, table.learning.batch_size, table.buckets.resolution) == ("video", 1, (64, 48))
    assert (table.cache_directory, table.buckets.target_frames) == (Path("c"), (1, 9))


def test_a_uniform_sample_of_one_is_head(tmp_path: Path, caplog) -> None:
    (table,) = tables(tmp_path, '[[datasets]]\nvideo_directory = "v"\nframe_extraction = "uniform"')

    assert table.buckets.frame_extraction == "head"
    assert 'the same as "head"' in caplog.text


def test_the_metadata_entry_has_the_keys_of_the_format(tmp_path: Path) -> None:
    images, videos = tables(
        tmp_path,
        """
        [[datasets]]
        image_directory = "data/pics"
        control_directory = "data/control"
        caption_extension = ".txt"
        fp_1f_clean_indices = [0, 10]
        fp_1f_target_index = 1
        fp_latent_window_size = 9
        [[datasets]]
        video_tars = ["data/a.tar", "data/b-*.tar"]
        cache_directory = "cache"
        target_frames = [1, 17]
        source_fps = 30
        """,
    )

    assert images.describe() == {
        "resolution": [960, 544],
        "caption_extension": ".txt",
        "batch_size_per_device": 1,
        "num_repeats": 1,
        "enable_bucket": False,
        "bucket_no_upscale": False,
        "image_directory": "pics",
        "control_directory": "control",
        "has_control": True,
        "fp_1f_clean_indices": [0, 10],
        "fp_1f_target_index": 1,
    }
    described = videos.describe(has_control=True)
    assert described.keys() - images.describe().keys() == {
        *("video_tars", "target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames"),
        "source_fps",
    }
    found = [described[name] for name in ("caption_extension", "target_frames", "source_fps", "video_tars")]
    assert found == [None, [1, 17], 30.0, videos.source.path.name]


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog) -> None:
    caplog.set_level(logging.WARNING)


def read_page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


MANUAL = "".join(map(read_page, ("dataset", "dataset_keys", "dataset_large")))
IMAGES, TOOLS = read_page("image_datasets"), read_page("dataset_tools")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", MANUAL + TOOLS + IMAGES, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", blocks("toml"), ids=range(len(blocks("toml"))))
def test_its_configurations_load(tmp_path: Path, text: str, caplog) -> None:
    tables(tmp_path, text)

    assert not caplog.records


def test_its_lists_are_valid() -> None:
    records = [json.loads(line) for text in blocks("jsonl") for line in text.splitlines()]

    assert records
    assert all({"caption"} < record.keys() for record in records)


def test_it_names_every_key_and_mode_with_where_it_may_stand() -> None:
    rows = {
        match[1]: match[0].split("|") for match in re.finditer(r"^\| `(\w+)` \|.*$", MANUAL, re.MULTILINE)
    }

    assert rows.keys() == KEYS.keys()
    for name, key in KEYS.items():
        assert (rows[name][-2].strip() == "yes") == key.in_general, name
        kinds = {"both": {"image", "video"}, "images": {"image"}, "clips": {"video"}}[rows[name][-3].strip()]
        assert kinds == {*key.kinds}, name
    assert all(f'`"{mode}"`' in MANUAL for mode in MODES)


def test_the_manual_of_pictures_names_every_key_with_where_it_may_stand() -> None:
    table = IMAGES[IMAGES.index("## Every key") : IMAGES.index("## Without a file")]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    places = {name: row[-1].strip("| ") for row in rows for name in re.findall(r"`(\w+)`", row[0])}

    words = {SUBSET: "subset", ANYWHERE: "anywhere", DATASET: "dataset"}
    assert places == {name: words[key.level] for name, key in SUBSET_KEYS.items()}


@pytest.mark.parametrize("place", ["[general]", "[[datasets]]"])
def test_a_cache_folder_of_references_is_taken_with_a_line(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = "[general]\nresolution = 64\n[[datasets]]\nvideo_directory = 'v'\nreference_directory = 'r'\n"
    path = tmp_path / "data.toml"
    path.write_text(text.replace(place, f"{place}\nreference_cache_directory = 'r/cache'"), encoding="utf-8")

    with caplog.at_level("INFO"):
        (table,) = load_dataset_config(path).datasets

    assert table.references.reference_directory == Path("r")
    said = "reference_cache_directory is not needed: caches of references and guides are with those of their"
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("reference_audio_directories = ['r']", "a clip has one audio reference"),
        ("audio_bucket_strategy = 'pad'", "audio is as long as its clip"),
        ("audio_jsonl_file = 'a'", "it lists audio without clips"),
        ("separate_audio_buckets = true", "do not affect the audio of other clips"),
    ],
)
@pytest.mark.parametrize("place", ["[general]", "[[datasets]]"])
def test_keys_of_the_known_fork_are_refused_with_the_reason(
    tmp_path: Path, key: str, reason: str, place: str
) -> None:
    text = "[general]\nresolution = 64\n[[datasets]]\nvideo_directory = 'v'\n".replace(
        place, f"{place}\n{key}"
    )
    with pytest.raises(DatasetError, match=f"{key.split()[0]} = .* is not supported: .*{reason}.*Omit it$"):
        tables(tmp_path, text)


@pytest.mark.parametrize(("key", "more"), [("audio_directory", ""), ("audio_jsonl_file", "max_frames = 33")])
def test_a_table_of_sound_alone_is_one_of_black_clips(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, more: str
) -> None:
    caplog.set_level("INFO")
    text = "[general]\nresolution = [512, 512]\n[[datasets]]\naudio_bucket_interval = 2.0\n"
    text = f"{text}{key} = 'a'\ncache_directory = 'c'\n{more}\n"
    (table,) = tables(tmp_path, text)
    assert (table.source_key, table.source.path, table.buckets.resolution) == (key, Path("a"), (64, 64))
    assert (table.buckets.frame_extraction, table.buckets.max_frames) == ("full", 33 if more else 497)
    assert "ignored" not in caplog.text
    (table,) = tables(tmp_path, f"{text}target_frames = [9]")
    assert (table.buckets.frame_extraction, table.buckets.target_frames) == ("head", (9,))
    assert tables(tmp_path, f"{text}source_fps = 24.0")[0].buckets.source_fps == "auto"
    assert "source_fps: ignored, because audio files have no images" in caplog.text
    with pytest.raises(DatasetError, match='audio = "ignore" leaves nothing to learn of audio files'):
        tables(tmp_path, f"{text}audio = 'ignore'")
    with pytest.raises(DatasetError, match="audio_directory and audio_jsonl_file exclude each other"):
        tables(tmp_path, f"{text}{'audio_directory' if more else 'audio_jsonl_file'} = 'b'")


def test_masks_may_be_spelt_as_in_the_known_fork(tmp_path: Path) -> None:
    text = "[[datasets]]\nvideo_directory = 'v'\nloss_mask_directory = 'm'\n"
    text += "[[datasets]]\nimage_directory = 'p'\n"
    masked, clear = tables(tmp_path, f"{text}loss_mask_use_alpha = true\n")
    assert (masked.source.mask_directory, clear.source.alpha_mask) == (Path("m"), True)
    with pytest.raises(DatasetError, match="loss_mask_directory and mask_directory are the same key"):
        tables(tmp_path, text.replace("'m'", "'m'\nmask_directory = 'n'"))


def family(step: int, first: int = 1, in_sections: bool = False) -> Any:
    """The facts of a family that change a configuration."""
    return SimpleNamespace(
        latent=SimpleNamespace(
            lengths=ClipLengths(step, first), in_sections=in_sections, caches_audio=False, has_layers=False
        ),
        references=None,
        abilities=SimpleNamespace(references="", match_audio_schedule=False, takes_row_references=False),
    )


@pytest.mark.parametrize(
    ("step", "first", "lengths"),
    [(1, 1, (1, 14, 45)), (4, 1, (1, 13, 45)), (8, 1, (1, 9, 41)), (17, 5, (1, 5, 39))],
)
def test_lengths_are_those_of_the_family(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int, first: int, lengths: tuple[int, ...]
) -> None:
    text = "[[datasets]]\nvideo_directory = 'v'\ntarget_frames = [45, 1, 14]\n"
    config = load_dataset_config(write(tmp_path, text))
    assert for_family(config, family(step, first)).datasets[0].buckets.target_frames == lengths
    assert "ignored" not in caplog.text
    assert (f"become {list(lengths)}, because clips of this model have {step}n + {first}" in caplog.text) == (
        step > 1
    )


def test_keys_of_sections_are_told_to_families_that_take_clips_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "[[datasets]]\nimage_directory = 'v'\nfp_1f_target_index = 3\nfp_1f_no_post = true\n"
    config = load_dataset_config(write(tmp_path, text))
    for_family(config, family(1, in_sections=True))
    for_family(config, family(1), for_texts=True)
    assert not caplog.text
    for_family(config, family(1))
    assert "fp_1f_target_index and fp_1f_no_post: ignored, because only FramePack, and Wan and" in caplog.text


OTHER = {  # another value, as a table holds it, of each key that makes caches stale
    "resolution": (64, 32),
    "enable_bucket": True,
    "bucket_no_upscale": True,
    "load_tensors": True,
    "mask_directory": Path("masks"),
    "alpha_mask": True,
    "multiple_target": True,
    "target_frames": (1, 5),
    "frame_extraction": "chunk",
    "frame_stride": 2,
    "frame_sample": 3,
    "max_frames": 7,
    "source_fps": 30.0,
    "target_fps": 25.0,
    "fp_latent_window_size": 4,
    "fp_1f_clean_indices": (0, 3),
    "fp_1f_target_index": 2,
    "fp_1f_no_post": True,
    "no_resize_control": True,
    "control_resolution": (64, 32),
    "trigger_word": "cat",
    "caption_prefix": "a",
    "caption_suffix": "b",
    "multi_caption": True,
}
RANKED = [  # as states and LoRA files have them since the keys exist
    *("trigger_word", "caption_prefix", "caption_suffix", "multi_caption", "no_resize_control"),
    *("control_resolution", "caption_dropout_rate", "reference_dropout_rate", "prior_loss_weight"),
    *("alpha_mask", "audio", "mask_directory", "audio_directory"),
    *("min_timestep", "max_timestep", "discrete_flow_shift"),
]


def what_caches_tell(table: DatasetTable) -> tuple[object, object]:
    """What is compared of latents and of texts, of a source with whatever the table may ask for."""
    tensors = CogVideoXTensors(Path(), "a", False) if table.source.has_precomputed_latents else None
    mask = None if table.source.mask_directory is None else table.source.mask_directory / "a.png"
    image = Path("a.png")
    layers = (image,) if table.source.multiple_target else ()
    source = MediaSource(
        image, "a", None, None, (image,), table, mask=mask, precomputed=tensors, layers=layers
    )
    cache_settings = LatentCacheSettings("toy", {}, LATENT, 24.0, lambda *_: None, Stores())
    modes = [table.with_values(frame_extraction=mode) for mode in ("uniform", "slide", "full")]
    taken = [spans(one, 29) for one in (table, *modes)]
    boxes = [find_bucket(table, size, 16, image) for size in ((640, 480), (16, 48))]
    return (cache_settings.record_options(source), taken, boxes), table.non_default_values(TEXTS)


@pytest.mark.parametrize("name", [name for name in KEYS if name not in SOURCES])
def test_each_key_makes_stale_what_it_says_and_nothing_else(tmp_path: Path, name: str) -> None:
    default = make_table(tmp_path, target_frames=(5,), enable_bucket=name == "bucket_no_upscale")
    stale, latents = KEYS[name].stale, LATENTS | FRAMES | SECTIONS | REFERENCES
    changes: dict[str, Any] = {name: OTHER.get(name, "other")}
    if name in FORMAT_KEYS:  # of a form of data, whose tables alone have it
        default = default.with_values(format_keys=make_format_keys(**{name: FORMAT_KEYS[name].default}))
        changes = {
            "format_keys": make_format_keys(**changes),
            "has_precomputed_latents": name == "load_tensors",
        }
    other = default.with_values(**changes)
    (before, texts), (now, texts_now) = map(what_caches_tell, (default, other))

    assert (now != before, texts_now != texts) == (bool(stale & latents), bool(stale & TEXTS))
    assert (name in other.learning_keys) == bool(stale & LEARNING)
    assert (name in OTHER) == bool(stale & (latents | TEXTS))


def test_settings_of_a_state_stand_in_the_order_that_states_have(tmp_path: Path) -> None:
    changed = {name: OTHER.get(name, Path("x/other")) for name in reversed(RANKED)}
    assert list(make_table(tmp_path, **changed).learning_keys) == RANKED
