"""What `new` prints is read in the language of the page, if it has a usual form."""

import re
import time
import zlib
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

import torch
from PIL import Image

from browser.core.language_tables import read_texts
from browser.jobs.jobs import Job
from browser.jobs.printed_lines import (
    is_for_terminal,
    translate_command,
    translate_file_kind,
    translate_line,
    translate_reason,
)
from browser.jobs.render_queue import PHASES
from checkpoints.first_bytes import LFS_POINTER, describe_kind
from checkpoints.kinds import SHARED_PART_MARKS, TOOL_MARKS, UNSUPPORTED_MODELS
from modules import installation
from modules.errors import UserError
from modules.pages.language import Language, TranslatableText, show, speaking
from project.files import write_project
from project.kinds.whole_model import why_not_full
from project.new_options import NewOptions
from project.options import find_models
from protocols.families import family_marks
from tests.browser.serving import serve_runs, write_run
from tests.browser.test_walk import save_images
from tests.commands import ROOT, run_script
from training.reports.history import HIGHEST, PREDICTED, History, PageCommand
from training.summary import list_memory


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that `new` prints of a folder with captions, and of one without."""
    monkeypatch.setenv("COLUMNS", "10000")
    save_images(tmp_path / "a b ü")
    save_images(tmp_path / "none")
    for path in (tmp_path / "none").glob("*.txt"):
        path.unlink()
    models = tmp_path / "models"
    for name in ("a b ü", "none"):
        options = NewOptions.from_defaults(
            folder=tmp_path / name,
            family="stable_diffusion",
            task="1.5",
            memory=12,
            models=models,
        )
        write_project(options)
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]


@pytest.mark.parametrize("code", ["zh", "ja"])
def test_each_line_of_a_usual_folder_is_shown_in_the_language_of_the_page(
    printed: list[str], code: str
) -> None:
    shown = [line for line in printed if not is_for_terminal(line)]
    assert len(printed) - len(shown) == 3
    with speaking(Language(code, read_texts(code))):
        for line in shown:
            words = translate_line(line)
            assert isinstance(words, TranslatableText), line
            assert words == line  # what programs compare stays
            assert words.translated() != line
            assert any(ord(character) > 0x3000 for character in words.translated())
    assert [translate_line(line) for line in shown] == shown


def save(path: Path, width: int = 320, mode: str = "RGB", caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, 300), zlib.crc32(path.name.encode()) % 0xFFFFFF).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def fill_odd_folders(root: Path) -> None:
    """Write folders of which `new` has much to say."""
    for index in range(4):
        save(root / "tags" / f"t{index}.png", caption=f"1girl, solo, blue_hair, looking_back, t{index}")
        save(root / "kohya" / "img" / "10_ohwx man" / f"k{index}.png")
        save(root / "kohya" / "reg" / "1_man" / f"r{index}.png")
        save(root / "pairs" / f"e{index}.png", caption="an edge")
        save(root / "pairs" / "conditioning" / f"e{index}.png")
        save(root / "masks" / f"m{index}.png", caption="a cat")
        save(root / "masks" / "masks" / f"m{index}.png")
        save(root / "mixed" / f"p{index}.png", width=500 + index, mode="RGBA", caption="a dog")
    mixed = root / "mixed"
    save(mixed / "tiny.png", width=64, caption="tiny")
    save(mixed / "wide.png", width=3000)
    for name in ("same1.png", "same2.png"):
        Image.new("RGB", (300, 300), 77).save(mixed / name)
    (mixed / "p0.txt").write_bytes("schön".encode("latin-1"))
    (mixed / "p1.txt").write_text("", encoding="utf-8")
    for name in ("broken.png", "empty.jpg", "notes.txt", "x.pdf", "x.heic", "x.psd", "x.wav", "x.zip"):
        (mixed / name).write_bytes(b"" if name == "empty.jpg" else b"x")
    (root / "none").mkdir()
    (root / "none" / "a.pdf").write_bytes(b"x")


# what no language changes: paths, options, keys, code, names of models, programs and formats
NAMES = re.compile(
    r"`[^`]*`|'[^']*'|\([^()]*, \.\.\.\)|--[\w-]+|\S*[/_=\[]\S*|[A-Z]\w*(?:-\w+)*"
    r"|[\w./~\\ -]*\.(?:png|jpg|txt|toml|pdf|heic|psd|wav|zip|md|bak)\b"
    r"|\b(?:wan|edit|t2v|resolution|transformer|fp8|control|before|source|reference)\b"
    r"|\b(?:pip|install|pillow-heif|ohwx|man|reg|true|lora|masks|python|reelsmith|run|hair|1girl|solo)\b"
    r"|\bthe cat wears a hat\b"
)


@pytest.mark.parametrize("code", ["zh", "ja"])
def test_no_english_word_is_left_of_odd_folders(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    fill_odd_folders(tmp_path)
    models = {"stable_diffusion": "xl", "wan": "t2v-1.3B", "qwen_image": "edit"}
    printed: list[str] = []
    for folder in sorted(tmp_path.iterdir()):
        for family, task in models.items():
            options = NewOptions.from_defaults(
                folder=folder, family=family, task=task, memory=12, models=tmp_path, overwrite=True
            )
            try:
                write_project(options)
            except UserError as error:
                printed += f"{type(error).__name__}: {error}".splitlines()
            printed += capsys.readouterr().out.splitlines()
    shown = {line.strip() for line in printed if line.strip() and not is_for_terminal(line)}
    shown = {line for line in shown if not line.startswith(("python ", "reelsmith "))}
    assert len(shown) > 50
    with speaking(Language(code, read_texts(code))):
        texts = {line: show(translate_line(line)).replace(str(tmp_path), "") for line in shown}
    left = {line: text for line, text in texts.items() if re.search(r"[a-z]{3,}", NAMES.sub("", text))}
    assert left == {}


DISTILLED = [
    ("flux", "schnell"),
    ("flux_2", "klein-4b"),
    ("hidream_o1", "dev"),
    ("minimax_h3", "t2va"),
    ("z_image", "turbo"),
]


@pytest.mark.parametrize("code", ["zh", "ja"])
def test_no_english_word_is_left_of_the_warning_about_a_distilled_model(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    save(tmp_path / "cats" / "a.png", caption="a cat")
    for family, task in DISTILLED:
        options = NewOptions.from_defaults(
            folder=tmp_path / "cats", family=family, task=task, memory=12, models=tmp_path, overwrite=True
        )
        write_project(options)
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if "unlearns" in line or "holds a part of it" in line]
    assert sum("unlearns" in line for line in warnings) == len(DISTILLED)
    with speaking(Language(code, read_texts(code))):
        texts = [show(translate_line(line)) for line in warnings]
    names = re.compile(rf"{NAMES.pattern}|[\w.-]*[\d_/-][\w./-]*|\b(?:flux|schnell|klein|dev|turbo)\b")
    left = [text for text in texts if re.search(r"[a-z]{3,}", names.sub("", text))]
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("code", ["zh", "ja"])
def test_no_english_word_is_left_of_a_check(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    fill_odd_folders(tmp_path)
    files = tuple(f"{name}={ROOT / f'pocket/{name}.safetensors'}" for name in ("dit", "vae", "t5"))
    for name in ("mixed", "masks"):
        options = NewOptions.from_defaults(
            folder=tmp_path / name,
            family="wan",
            task="t2v-1.3B",
            memory=12,
            models=tmp_path,
            model_files=files,
        )
        write_project(options)
    lines = set()
    for name in ("mixed", "masks"):
        result = run_script("reelsmith.py", "run", str(tmp_path / name), "--check", check=False)
        lines |= {line.strip() for line in result.stdout.splitlines()}
    commands = ("$ ", "python ", "tile: ", "vae dtype: ", "t5 tokenizer: ")
    shown = {line for line in lines if line and not line.startswith(commands)}
    assert len(shown) > 20
    with speaking(Language(code, read_texts(code))):
        texts = {line: show(translate_line(line)).replace(str(tmp_path), "") for line in shown}
    names = re.compile(rf"{NAMES.pattern}|\b(?:vae|t5|token|conv|hub|dtype|schön|dataset|datasets)\b")
    left = {line: text for line, text in texts.items() if re.search(r"[a-z]{3,}", names.sub("", text))}
    assert left == {}


@pytest.mark.parametrize("code", ["zh", "ja"])
def test_no_english_word_is_left_of_what_a_model_file_is(code: str) -> None:
    kinds = {what for mark, what in (*UNSUPPORTED_MODELS, *family_marks(), *SHARED_PART_MARKS, *TOOL_MARKS)}
    names = re.compile(
        r"--\w+|\S+\.py|reelsmith [\w-]+|[a-z]+_train_\w+|[\w.-]*[A-Z0-9][\w.-]*"
        r"|\b(?:transformer|layered|diffusers|gimmvfi_r|codeformer)\b"
    )
    with speaking(Language(code, read_texts(code))):
        texts = {kind: show(translate_file_kind(kind)) for kind in kinds}
        unknown = show(translate_file_kind(None))
    left = {kind: text for kind, text in texts.items() if re.search(r"[a-z]{2,}", names.sub("", text))}
    assert left == {}
    assert not re.search(r"[a-z]", unknown)
    assert translate_file_kind("a box of bolts") == "a box of bolts"


@pytest.mark.parametrize("code", ["zh", "ja"])
def test_why_a_model_is_not_read_or_not_trained_whole_is_told_in_the_language_of_the_page(code: str) -> None:
    lines = {why_not_full(model, memory) for model in find_models() for memory in (0, 4)} - {None}
    lines |= {f"It {describe_kind(start)}" for start in (LFS_POINTER, b"<html>")}
    assert any("but the card has 4 GiB" in line for line in lines if line)
    with speaking(Language(code, read_texts(code))):
        texts = {line: show(translate_line(line or "")) for line in lines}
    assert [line for line, text in texts.items() if max(text) < "\u3000"] == []


@pytest.mark.parametrize("code", ["zh", "ja"])
@pytest.mark.parametrize(
    ("line", "number"),
    [("1 has no caption:", "1"), ("12 have no caption:", "12"), ("1 folder is not searched:", "1")],
)
def test_a_count_of_faults_is_translated_in_singular_and_plural(line: str, number: str, code: str) -> None:
    with speaking(Language(code, read_texts(code))):
        text = show(translate_line(line))
    assert text.endswith("：")
    assert number in text
    assert not re.search(r"[a-z]", text)


@pytest.mark.parametrize("code", ["zh", "ja"])
@pytest.mark.parametrize(
    "line",
    [
        "a.png, b.png: empty captions: only ohwx is learned there",
        "a.mp4: shorter than 17 frames (at 16 a second)",
        "a.png and 3 more: images, which this model cannot train on",
        "/x/set: learned by its masks",
        "12 captions: lists of tags (cat, ...), used unchanged: wan t2v-1.3B was trained on sentences",
        "captions that are not UTF-8: a.txt: read as Windows-1252",
        "1 cannot be read and has no caption, which ends a run: delete each, or move it away:",
    ],
)
def test_lines_of_less_usual_folders_are_translated_with_their_names_and_numbers(
    line: str, code: str
) -> None:
    with speaking(Language(code, read_texts(code))):
        shown = show(translate_line(line))
    assert any(ord(character) > 0x3000 for character in shown)
    for stays in re.findall(r"[\w/]+\.\w+|/x/set|\d+|ohwx|Windows-1252|t2v-1.3B", line):
        assert stays in shown
    for word in ("caption", "learn", "short", "read as", "frames"):
        assert word not in shown


def test_names_cannot_make_a_line_slow_and_other_lines_stay() -> None:
    for line in (": . at , on " * 20_000, "names: " * 50_000, "a line of another form", ""):
        begin = time.process_time()
        assert translate_line(line) == line
        assert time.process_time() - begin < 1


def test_each_phase_that_a_generation_names_is_a_text_of_the_page() -> None:
    named = re.findall(
        r'on_phase\("([^"]+)"', (installation.ROOT / "generation/making.py").read_text(encoding="utf-8")
    )
    assert len(named) >= 4
    assert {*named} <= {*map(str, PHASES)}


@pytest.mark.parametrize("code", ["zh", "ja"])
@pytest.mark.parametrize(
    "told",
    [
        "ended by an error after step 1,200: CUDA out of memory",
        "stopped after step 7",
        "ended while caching latents: exit code 1",
        "ended while downloading the model: it was stopped",
        "most host memory of this process so far, measured",
        "cpu: a prediction is made for CUDA devices (--plan)",
        PREDICTED,
        HIGHEST,
    ],
)
def test_how_a_run_ended_and_its_memory_are_told_in_the_language_of_the_page(told: str, code: str) -> None:
    with speaking(Language(code, read_texts(code))):
        shown = show(translate_line(told))
        assert any(ord(character) > 0x3000 for character in shown)
        for stays in re.findall(r"\d[\d,]*|CUDA(?: out of memory)?|cpu|--plan", told):
            assert stays in shown
        for word in ("ended", "stopped", "caching", "exit", "measured", "predict"):
            assert word not in shown


def test_all_that_a_training_notes_of_its_memory_and_its_end_is_translated(tmp_path: Path) -> None:
    rows = list_memory(torch.device("cpu"), None)
    folder = tmp_path / "runs"
    ended = write_run(folder, "stopped", 3, None)
    history = History(ended, 1, 3)
    history.add(3, memory=rows)
    history.add(3, ended="ended by an error after step 3: no space", kind="bad")
    history.flush()
    texts = read_texts("zh")
    with serve_runs(tmp_path) as served:
        for address in ("/", served.of("stopped")):
            page = served.ask(address, Cookie="", Accept_Language="zh").text
            assert "ended by an error" not in page
            assert texts["ended by an error after step %(step)s: %(reason)s"].split("%")[0] in page
        assert "measured" not in page
        assert texts["most host memory of this process so far, measured"] in page


@pytest.mark.parametrize("code", ["zh", "ja"])
@pytest.mark.parametrize(
    ("told", "stays"),
    [
        (
            "/d/x.safetensors cannot be written: the disk is full. No partial file was kept. Free some space "
            "or choose another folder, and run again.",
            "/d/x.safetensors",
        ),
        ("the device has too little memory for this run: CUDA out of memory.", "CUDA out of memory"),
        ("m/dit.safetensors: there is no such file or folder. Did you mean m/dit2.safetensors?", "dit2"),
        ("step 7: the loss is nan, the gradient norm 1.0; nothing of this step was saved.", "nan"),
    ],
)
def test_the_reason_of_an_end_is_told_in_the_language_of_the_page(told: str, stays: str, code: str) -> None:
    with speaking(Language(code, read_texts(code))):
        for shown in (
            show(translate_reason(f"{told}\n  details")),
            show(translate_line(f"ended by an error after step 7: {told}")),
        ):
            assert stays in shown
            assert not re.search("cannot|memory for|no such|nothing of|ended", shown)
        assert show(translate_reason(f"{told}\n  details")).endswith("\n  details")
    assert translate_reason("another text\nof two lines") == "another text\nof two lines"


def test_commands_below_a_run_are_told_in_the_language_of_the_page() -> None:
    note = "The first sample again; change the prompt. Commands here are typed in the folder /d/a b."
    command = PageCommand("Convert the LoRA for ComfyUI", "python x.py", "python x.py", note)
    assert translate_command(command) == command
    with speaking(Language("zh", read_texts("zh"))):
        shown = translate_command(command)
        assert "ComfyUI" in show(shown.title)
        assert "Convert" not in show(shown.title)
        assert "/d/a b" in show(shown.note)
        assert not re.search("Commands|sample", show(shown.note))


@pytest.mark.parametrize("code", ["zh", "ja"])
def test_the_last_lines_of_a_job_are_told_in_the_language_of_the_page(code: str, tmp_path: Path) -> None:
    log = tmp_path / "1.log"
    log.write_text(
        "loss=0.5\n  cats has 0 control images for cat_4; needed: cat_4.png (or another image type)\n"
    )
    job = Job(id=1, line="x", folder=str(tmp_path), log=log, process=None, stops=0)
    assert job.show_lines() == job.last_lines()
    with speaking(Language(code, read_texts(code))):
        first, second = show(job.show_lines()).split("\n")
    assert first == "loss=0.5"
    assert second.startswith("  cats ")
    assert re.findall("[a-z0-9_.]{3,}", second) == ["cats", "cat_4", "cat_4.png"]
