"""tools/compare.py: every prompt with every LoRA at every strength, on a model that is loaded once."""

import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wan_generate_video
from generation.grid_options import family_of
from modules.errors import OptionError, UserError
from modules.media.reading import read_image, read_tags, video_frames, video_info
from tests.browser import open_page
from tests.tiny.project import write_lora
from tests.tiny.wan import TinyWan, write_tiny_wan
from tools import compare

SIZE = ("--video_size", "32", "48", "--video_length", "5", "--infer_steps", "2", "--device", "cpu")
HOSTILE = "<script>alert(1)</script> a cat"


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> TinyWan:
    files = write_tiny_wan(tmp_path_factory.mktemp("t2v"))
    for rank in (2, 10):
        write_lora(files.dit.parent / f"style-{rank:06d}.safetensors", files.dit, rank)
    return files


def run(folder: Path, files: TinyWan, *more: object, loras: str = "style-*.safetensors") -> None:
    words = ["--family", "wan", "--lora", str(files.dit.parent / loras), "--save_path", str(folder)]
    compare.main([*words, "--task", "t2v-1.3B", *SIZE, *files.models, *map(str, more)])


def prompts(folder: Path) -> Path:
    path = folder / "p.txt"
    path.write_text(f"{HOSTILE} --d 7\na dog\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "speed",
    [(), ("--fp8_scaled",), ("--sample_solver", "lcm")],
    ids=["in place", "loaded for each", "with fresh noise"],
)
def test_a_clip_equals_what_the_generation_script_makes(
    tmp_path: Path, t2v: TinyWan, speed: tuple[str, ...]
) -> None:
    more = ("--prompt", "a cat", *speed)
    run(tmp_path / "grid", t2v, *more, "--lora_multiplier", 0.6, 1, "--output_type", "both")

    made = {path.name: load_file(path)["latent"] for path in (tmp_path / "grid").glob("*_latent.safetensors")}
    assert len(made) == 5
    lora = t2v.dit.parent / "style-000010.safetensors"
    for column, weights in {
        "without-LoRA": [],
        "style-000010-x-0-6": ["--lora_weight", str(lora), "--lora_multiplier", "0.6"],
        "style-000010-x-1": ["--lora_weight", str(lora)],
    }.items():
        folder = tmp_path / column
        wan_generate_video.main(
            ["--save_path", str(folder), "--task", "t2v-1.3B", *SIZE, *t2v.models, *more]
            + ["--seed", "0", "--output_type", "latent", *weights]
        )
        (path,) = folder.iterdir()
        (name,) = (name for name in made if name.startswith(f"001_0_{column}_"))
        assert torch.equal(made[name], load_file(path)["latent"]), column
    tensors = list(made.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])


def test_loras_of_two_experts_are_compared_in_pairs(tmp_path: Path) -> None:
    files = write_tiny_wan(tmp_path / "models", experts=2)
    for name, rank in (("low", 2), ("high", 3)):
        write_lora(tmp_path / f"{name}.safetensors", files.dit, rank)
    more = ["--task", "t2v-A14B", *SIZE, "--flow_shift", "1", *files.models, "--prompt", "a cat"]
    pair = ["--lora", str(tmp_path / "low.safetensors"), "--lora_high_noise", str(tmp_path / "high*")]

    compare.main(
        ["--family", "wan", *pair, "--lora_multiplier", "0.6", "--save_path", str(tmp_path / "grid"), *more]
        + ["--output_type", "both"]
    )

    (column,) = (tmp_path / "grid").glob("*low-x-0-6*_latent.safetensors")
    with safe_open(column, "pt") as file:
        metadata = file.metadata()
    names = ("bt_lora_0", "bt_lora_high_noise_0")
    assert [metadata[name] for name in names] == ["low.safetensors: 0.6", "high.safetensors: 0.6"]
    assert metadata["bt_lora_sha256_0"] != metadata["bt_lora_high_noise_sha256_0"]
    words = next((tmp_path / "grid").glob("*.html")).read_text(encoding="utf-8")
    assert "--lora_weight_high_noise" in words
    weights = [
        word
        for option, name in (("", "low"), ("_high_noise", "high"))
        for word in (f"--lora_weight{option}", str(tmp_path / f"{name}.safetensors"))
    ]
    strengths = ["--lora_multiplier", "0.6", "--lora_multiplier_high_noise", "0.6"]
    wan_generate_video.main(
        ["--save_path", str(tmp_path / "one"), *more, *weights, *strengths, "--seed", "0"]
        + ["--output_type", "latent"]
    )
    (path,) = (tmp_path / "one").iterdir()
    assert torch.equal(load_file(column)["latent"], load_file(path)["latent"])


def test_the_grids_show_every_clip_with_its_labels(
    tmp_path: Path, t2v: TinyWan, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    run(tmp_path / "grid", t2v, "--from_file", prompts(tmp_path))

    page, sheet, video = (
        next((tmp_path / "grid").glob(f"compare_*.{kind}")) for kind in ("html", "png", "mp4")
    )
    assert len(list((tmp_path / "grid").glob("00[12]_*.mp4"))) == 6
    assert caplog.text.count("style-000002 x 1\n") == 1
    assert "6 clips" in caplog.text
    assert caplog.text.count(f"Loading {t2v.dit}") == 1
    assert len(list(video_frames(video))) == 5
    info = video_info(video)
    assert read_image(sheet).shape == (info.height, info.width, 3)
    with open_page(page) as opened:
        assert opened.locator("td video").count() == 6
        assert opened.locator("script").count() == 0
        assert opened.title() == "style"
        headings = opened.locator("thead").first.locator("th").all_inner_texts()
        assert headings == ["strength", "without LoRA", "style-000002", "style-000010"]
        assert HOSTILE in opened.locator("h2").first.inner_text()
        assert not opened.problems


def test_an_interrupted_comparison_goes_on_and_replaces_nothing(
    tmp_path: Path, t2v: TinyWan, caplog: pytest.LogCaptureFixture
) -> None:
    folder, caplog_text = tmp_path / "grid", "4 of them made before"
    run(folder, t2v, "--from_file", prompts(tmp_path))
    times = {path: path.stat().st_mtime_ns for path in folder.glob("00*.mp4")}
    gone = sorted(times)[:2]
    for path in gone:
        path.unlink()
    caplog.set_level(logging.INFO)

    run(folder, t2v, "--from_file", prompts(tmp_path))

    assert caplog_text in caplog.text
    assert {path for path in times if path.stat().st_mtime_ns == times[path]} == set(times) - set(gone)
    assert len(list(folder.glob("compare_*.html"))) == 2

    run(folder, t2v, "--from_file", prompts(tmp_path), "--guidance_scale", 3)

    again = [path for path in folder.glob("00*.mp4") if path.stem.endswith("_")]
    assert len(again) == 6
    assert {read_tags(path)["bt_guidance_scale"] for path in again} == {"3.0"}


def test_a_retrained_lora_of_the_same_name_is_not_taken_for_the_old_one(tmp_path: Path, t2v: TinyWan) -> None:
    lora = t2v.dit.parent / "other.safetensors"
    write_lora(lora, t2v.dit)
    run(tmp_path / "grid", t2v, "--prompt", "a cat", loras=lora.name)
    save_file({name: tensor * 2 for name, tensor in load_file(lora).items()}, lora)

    run(tmp_path / "grid", t2v, "--prompt", "a cat", loras=lora.name)

    assert len(list((tmp_path / "grid").glob("001_*_other*.mp4"))) == 2
    assert len(list((tmp_path / "grid").glob("001_*_without*.mp4"))) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--interactive",), "--interactive has no meaning"),
        (("--prompt", "a", "--save_last_frame"), "--save_last_frame has no meaning"),
        (("--prompt", "a", "--sheet", "seed=1,2"), "--sheet has no meaning"),
        (("--prompt", "a", "--output_type", "latent"), "--output_type latent has no meaning"),
        (("--prompt", "a", "--no_metadata"), "--no_metadata has no meaning"),
        (("--prompt", "a", "--post", "upscaler model=x"), "--post has no meaning"),
        (("--prompt", "a", "--lora_multiplier", "nan"), "--lora_multiplier nan: give a finite number"),
        (("--prompt", "a", "--lora_multiplier", *("1" * 70)), "64 are the most"),
        (("--prompt", "a", "--lora", "no-*.safetensors"), "--lora no-.*: no such file"),
    ],
)
def test_what_makes_no_comparison_is_refused(
    tmp_path: Path, t2v: TinyWan, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, t2v, *more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "wan2.1"}, "wan"),
        ({"modelspec.architecture": "hunyuan-video/lora"}, "hunyuan_video"),
        ({"ss_base_model_version": "framepack"}, "framepack"),
        ({"title": "x"}, None),
    ],
)
def test_the_family_is_what_the_lora_says(
    tmp_path: Path, metadata: dict[str, str], family: str | None
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata)
    families = ["framepack", "hunyuan_video", "wan"]
    if family is None:
        with pytest.raises(OptionError, match=re.escape("Give --family: framepack, hunyuan_video, wan")):
            family_of(path, families)
    else:
        assert family_of(path, families) == family
