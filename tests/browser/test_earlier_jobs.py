"""A job may read what jobs before it make; what none of them can make has to be there when it is added."""

from pathlib import Path

import pytest

from browser.jobs.earlier_jobs import EarlierJob, may_be_created
from browser.jobs.launch import INPUT_FILE_OPTIONS, check_options, find_earlier_job, split_arguments
from browser.jobs.typed_jobs import read_jobs
from modules.errors import OptionError
from modules.option_tables import list_option_names

RUN = "reelsmith run clips"


def add(earlier: str, line: str, folder: Path) -> None:
    job = find_earlier_job(split_arguments(earlier), folder)
    assert job is not None
    check_options(split_arguments(line), folder, [job])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "run.toml").write_text('[training]\noutput_dir = "../made ü"\n', encoding="utf-8")
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "train.toml").write_text("output_dir = 'trained'\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "reelsmith unpack nowhere.zip",
        "reelsmith pack nowhere",
        "reelsmith run nowhere",
        "reelsmith new nowhere --family wan --task t2v-1.3B",
        "python tools/score.py nowhere",
        "python tools/tag.py nowhere",
        "python tools/mask.py nowhere",
        "python tools/share_page.py nowhere.html",
        "python tools/dataset_report.py nowhere.toml --json",
        "python tools/caption_dataset.py nowhere.toml --dry_run",
        "python convert_lora.py --input nowhere.safetensors --output y.safetensors --target comfyui",
        "python resize_lora.py --model nowhere.safetensors --save_to y.safetensors --new_rank 2",
        "python merge_lora.py --lora_weight nowhere.safetensors --save_merged_model y.sft --dit clips",
        "python blissful_tuner/upscaler.py --input nowhere.mp4 --model a.safetensors",
        "python blissful_tuner/metaview.py nowhere.png",
        "python gen_img.py --prompt x --ckpt nowhere.safetensors",
    ],
)
@pytest.mark.parametrize("earlier", ["", RUN], ids=["alone", "behind a run"])
def test_what_no_job_makes_has_to_be_there(line: str, earlier: str, folder: Path) -> None:
    jobs = filter(None, [find_earlier_job(split_arguments(earlier), folder)])
    with pytest.raises(OptionError, match=r"nowhere.*no such (file|folder)"):
        check_options(split_arguments(line), folder, [*jobs])


def test_each_option_whose_file_has_to_be_there_is_one_of_a_script() -> None:
    assert {*INPUT_FILE_OPTIONS} <= {f"--{name}" for name in list_option_names()}


def test_a_record_that_stands_beside_code_with_torch_is_asked_too(folder: Path) -> None:
    words = split_arguments("python tools/quantise.py --model a.safetensors --form int8 --output a.bin")
    with pytest.raises(OptionError, match="--output a.bin: a safetensors file is written"):
        check_options(words, folder, [])


@pytest.mark.parametrize(
    ("earlier", "line"),
    [
        ("reelsmith pack clips", "reelsmith unpack clips-pack.zip"),
        ("reelsmith pack clips -o 'x y.zip'", "reelsmith unpack 'x y.zip'"),
        ("reelsmith unpack given.zip", "reelsmith run given"),
        ("reelsmith unpack given.zip 'new ü'", "reelsmith run 'new ü'"),
        (RUN, "python tools/score.py clips/output"),
        (RUN, "python tools/score.py 'made ü'"),
        (RUN, "python gen_img.py --prompt x --ckpt models/sd_xl_base_1.0.safetensors"),
        (
            "python convert_lora.py --input a.safetensors --output b.safetensors --target comfyui",
            "python convert_lora.py --input b.safetensors --output c.safetensors --target comfyui",
        ),
        (
            "python wan_train_network.py --config_file train.toml",
            "python convert_lora.py --input trained/x.safetensors --output c.safetensors --target comfyui",
        ),
        ("python blissful_tuner/upscaler.py a.mp4", "python blissful_tuner/metaview.py a_SWINIR.mp4"),
    ],
)
def test_what_a_job_before_it_makes_may_come(earlier: str, line: str, folder: Path) -> None:
    add(earlier, line, folder)
    with pytest.raises(OptionError, match="no such"):
        check_options(split_arguments(line), folder)


def test_the_first_of_several_lines_may_make_what_the_second_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    jobs = read_jobs("reelsmith pack clips\nreelsmith unpack clips-pack.zip 'a b'\nreelsmith run 'a b'", None)
    assert [words[1] for words, _ in jobs] == ["pack", "unpack", "run"]
    with pytest.raises(OptionError, match="other.zip"):
        read_jobs("reelsmith pack clips\nreelsmith unpack other.zip", None)


def test_a_file_of_settings_that_cannot_be_read_names_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_bytes(b"\xff'x'")
    job = EarlierJob(Path("wan_train_network.py"), ["--config_file", "train.toml", "a\0b"], tmp_path)
    assert not may_be_created(tmp_path / "x", [job])


def test_a_wrong_option_of_a_tool_without_options_is_refused(tmp_path: Path) -> None:
    check_options(split_arguments("reelsmith doctor"), tmp_path)
    with pytest.raises(OptionError, match="Unknown option --nix"):
        check_options(split_arguments("reelsmith doctor --nix"), tmp_path)
