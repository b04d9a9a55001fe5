"""From a folder of mixed files to a LoRA and a page, through the commands that a user types."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image

import stable_diffusion.family  # noqa: F401  # packages of it warn when they are imported
from checkpoints.writing import save_tensors
from dataset.caching import prefetch
from dataset.config import load_dataset_config
from dataset.subset_options import SubsetOptions
from dataset.subsets import folders_config
from downloads.catalogue import ModelSet
from modules.command import quote_command
from modules.errors import DatasetError, OptionError
from modules.installation import FROM_QUEUE, RUN_GOES_ON, SOURCES_LEFT_OUT
from modules.media.reading import Frame
from modules.text_files import parse_toml
from networks.adapter import import_network_module
from networks.loading import read_lora
from project import running
from project.kinds.composing import find_control_kind
from project.options import find_models
from project.run_options import RunOptions
from project.running import MediaCheck, _check_media, _make_model_metadata, run_command
from stable_diffusion.lines import import_prompter
from tests.commands import QUIET, ROOT, run_program, run_script
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.run_pages import read_run_page
from tests.tiny.new_models import MODELS as TINY
from tests.tiny.project import moving_square
from tests.waiting import PATIENCE
from training.config_options import toml_value
from training.reports.history import History, Start, history_path

MODEL = ["--family", "wan", "--task", "t2v-1.3B", "--memory", "0"]
for _name in ("dit", "vae", "t5"):
    MODEL += ["--model_file", f"{_name}={ROOT / 'pocket' / _name}.safetensors"]


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is described, for two steps with short samples."""
    folder = tmp_path_factory.mktemp("collected") / "my clips"
    write_folder(folder, seconds=0.4, size=(48, 32))
    run_script("reelsmith.py", "new", folder, *MODEL, "--max_train_steps", 2)
    shorten_samples(folder)
    return folder


def shorten_samples(folder: Path) -> None:
    prompts = folder / "prompts.txt"
    lines = prompts.read_text(encoding="utf-8").splitlines()
    prompts.write_text("".join(f"{line} --s 1\n" for line in lines), encoding="utf-8")


def copy(folder: Path, to: Path) -> Path:
    """Copy what is not made by commands."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("cache", "output")))


def list_commands(folder: Path) -> list[list[str]]:
    """The commands that `run` prints."""
    said = run_script("reelsmith.py", "run", folder, "--dry_run").stdout
    return [shlex.split(line)[2:] for line in said.splitlines() if line.startswith("$ ")]


def stems(commands: list[list[str]]) -> list[str]:
    """What the printed commands do."""
    return [Path(words[0]).stem.removeprefix("wan_") for words in commands]


def check_results(folder: Path) -> None:
    assert read_lora(folder / "output" / "my_clips.safetensors")
    page = read_run_page(folder / "output", "my_clips")
    assert "in falling snow" in page
    assert len([*(folder / "output" / "sample").glob("*.mp4")]) == 6
    assert "a square moves" in (folder / "check.html").read_text(encoding="utf-8")


def test_the_plain_commands_lead_to_a_lora_and_a_page(collected: Path) -> None:
    commands = list_commands(collected)
    texts = "cache_text_encoder_outputs"
    assert stems(commands) == ["cache_latents", texts, "cache_latents", texts, "train_network"]
    for script, *words in commands:
        succeed_here(Path(script).name, *words, folder=collected)
    check_results(collected)
    assert list_commands(collected)[-1][-2:] == ["--resume", "latest"]


@pytest.mark.slow
def test_the_check_tells_unreadable_files_from_other_faults(
    collected: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy(collected, tmp_path / "clips")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "damaged.jpg").write_bytes((folder / "j.jpg").read_bytes()[:400])  # its header is whole
    (folder / "damaged.txt").write_text("a square", encoding="utf-8")
    own = parse_toml((folder / "run.toml").read_text(encoding="utf-8"))["reelsmith"]

    outcome = _check_media(own["commands"][1], folder)
    assert run_command(own["commands"][2], folder) == SOURCES_LEFT_OUT
    (folder / "b.txt").unlink()
    without_caption = _check_media(own["commands"][1], folder)

    assert outcome.fatal_error_kinds == []
    names = sorted(Path(line.split()[0].strip(":")).name for line in outcome.unreadable_files)
    assert names == ["damaged.jpg", "gone.jpg"]
    capfd.readouterr()
    _check_media(own["commands"][1], folder, (0.5, 0))
    said = capfd.readouterr().out
    assert "for validation" in said
    assert without_caption == MediaCheck(fatal_error_kinds=["have no caption"], unreadable_files=[])


@pytest.mark.parametrize("kind", ["have no caption", "have a caption that cannot be used", "cannot be read"])
def test_each_fault_of_captions_has_its_own_remedy(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["python", "wan_cache_latents.py", "--check"]
    running._print_remedies(words, Path("clips"), [kind])
    said = capsys.readouterr().out
    assert "Fix the problems listed above" in said
    assert ("class_tokens" in said) is (kind == "have no caption")
    is_repaired = "wan_cache_latents.py --check --repair_captions" in said
    assert is_repaired is (kind == "have a caption that cannot be used")


@pytest.mark.parametrize(
    ("failing", "code", "ends"),
    [
        ("cache_latents", SOURCES_LEFT_OUT, None),
        ("cache_text_encoder_outputs", SOURCES_LEFT_OUT, None),  # it reads references
        ("cache_latents", 1, 1),  # a full disk
        ("train_network", 1, 1),
    ],
)
def test_a_run_goes_on_without_unreadable_files_alone(
    failing: str,
    code: int,
    ends: int | None,
    collected: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copy(collected, tmp_path / "clips")
    monkeypatch.setattr(running, "_check_training", lambda *_, **__: None)
    monkeypatch.setattr(running, "_check_media", lambda *_: MediaCheck([], ["damaged.jpg is damaged"]))
    monkeypatch.setattr(
        running,
        "run_command",
        lambda words, *_: code if failing in words[1] and "--check" not in words else 0,
    )
    with nullcontext() if ends is None else pytest.raises(SystemExit, match=f"^{ends}$"):
        running.run_project(RunOptions(folder=folder))


def test_a_command_on_another_drive_is_typed_by_its_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(*_: object) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", reject)
    words = ["python", "wan_train_network.py"]
    assert running.typed_in(words, Path("clips")) == quote_command(
        ["python", str(ROOT / "wan_train_network.py")]
    )


def test_no_hint_names_the_command_that_run_types_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(prefetch, "show_box", lambda *box: shown.append(box[2]))
    report, commands = prefetch.CacheReport(written=1), [("Next", "python x.py")]
    prefetch.conclude(report, (), commands)
    monkeypatch.setenv(RUN_GOES_ON, "1")
    prefetch.conclude(report, (), commands)
    assert shown == [commands, ()]


def test_a_finished_run_says_what_can_be_done(collected: Path, tmp_path: Path) -> None:
    output = tmp_path / "my clips" / "output"
    output.mkdir(parents=True)
    shutil.copy(collected / "run.toml", output.parent)
    save_tensors(output / "my_clips.safetensors", {"a": torch.zeros(1)}, {"ss_steps": "2"})

    done = run_script("run_project.py", output.parent / "run.toml")

    assert "trained already: 2 of 2 steps" in done.stdout
    for remedy in ("raise max_train_steps", "my_clips.html", "set output_name in run.toml"):
        assert remedy in done.stdout
    assert "$ " not in done.stdout

    text = (output.parent / "run.toml").read_text(encoding="utf-8")
    (output.parent / "run.toml").write_text(text.replace('"t2v-1.3B"\n', '"t2v-14B"\n'), encoding="utf-8")
    save_tensors(
        output / "my_clips.safetensors", {"a": torch.zeros(1)}, {"ss_steps": "2", "ss_task": "t2v-1.3B"}
    )
    told = run_here("run_project.py", output.parent, folder=tmp_path)
    assert_one_message(*told, "belongs to a different model (t2v-1.3B)", "Set another output_name")

    released = "wan2.1_t2v_14B_bf16.safetensors"
    for line, key, value in (
        ('model_version = "edit-2511"', "ss_model_version", "edit-2509"),
        (f'#files\nfiles = ["x/{released}"]', "ss_sd_model_name", "wan2.1_t2v_1.3B_bf16.safetensors"),
    ):
        changed = re.sub("^files = .*$", line, text, flags=re.MULTILINE) if "files" in line else text
        changed = changed.replace("[training]", f"[training]\n{line}") if "files" not in line else changed
        (output.parent / "run.toml").write_text(changed, encoding="utf-8")
        save_tensors(output / "my_clips.safetensors", {"a": torch.zeros(1)}, {"ss_steps": "2", key: value})
        told = run_here("run_project.py", output.parent, folder=tmp_path)
        assert_one_message(*told, f"belongs to a different model ({value})")


def test_a_finished_run_says_what_was_changed_after_it(collected: Path, tmp_path: Path) -> None:
    output = tmp_path / "my clips" / "output"
    output.mkdir(parents=True)
    shutil.copy(collected / "run.toml", output.parent)
    text = (output.parent / "run.toml").read_text(encoding="utf-8")
    save_tensors(output / "my_clips.safetensors", {"a": torch.zeros(1)}, {"ss_steps": "2"})
    trained_with = parse_toml(text)["training"]
    changed = [
        (name, str(float(value) if name == "network_alpha" else value))
        for name, value in trained_with.items()
    ]
    history = History(history_path(output, "my_clips"), session=1)
    history.add(0, started=asdict(Start(model="", total_steps=2, changed=changed)))
    history.flush()

    def run() -> str:
        printed = io.StringIO()
        assert run_here("run_project.py", output.parent, folder=tmp_path, printed=printed)[0] == 0
        return " ".join(printed.getvalue().split())

    assert "changed since" not in run()
    added = "network_dim = 8\nnetwrk_alpha = 4\nlr_warmup_steps = 7\nmax_grad_norm = 1.0"
    changed_text = re.sub("^network_dim = .*$", added, text, flags=re.MULTILINE)
    (output.parent / "run.toml").write_text(changed_text, encoding="utf-8")
    assert (
        "run.toml has changed since: network_dim 32 -> 8, netwrk_alpha (no option: did you mean "
        "network_alpha?), lr_warmup_steps 0 -> 7. This has no effect on my_clips.safetensors." in run()
    )


@pytest.mark.slow
def test_run_does_what_the_commands_do(collected: Path, tmp_path: Path) -> None:
    folder = copy(collected, tmp_path / "my clips")
    damaged = folder / "damaged.jpg"
    damaged.write_bytes((folder / "j.jpg").read_bytes()[:200])
    damaged.with_suffix(".txt").write_text("a square", encoding="utf-8")

    done = run_script("reelsmith.py", "run", folder)

    said = done.stdout.splitlines()
    assert said[-1] == f"The page of the training: {folder / 'output' / 'my_clips.html'}"
    assert "Trained without 1 that cannot be read:" in said
    assert "damaged.jpg" in said[-3]
    assert "Next, " not in done.stderr
    check_results(folder)
    again = run_script("reelsmith.py", "run", folder)
    assert "is trained already" in again.stdout


@pytest.mark.skipif(os.name == "nt", reason="it can have no such file")
def test_a_name_that_windows_cannot_have_is_refused_until_a_run_has_begun_under_it(
    collected: Path, tmp_path: Path
) -> None:
    folder = copy(collected, tmp_path / "clips")
    text = (folder / "run.toml").read_text(encoding="utf-8")
    changed = text.replace('output_name = "my_clips"', 'output_name = "my:clips"')
    (folder / "run.toml").write_text(changed, encoding="utf-8")
    told = run_here("run_project.py", folder, folder=tmp_path)
    assert_one_message(*told, "output_name 'my:clips': names on Windows cannot have the character :")

    history = history_path(folder / "output", "my:clips")
    history.parent.mkdir(exist_ok=True)
    history.touch()
    assert list_commands(folder)


def test_missing_files_of_the_model_are_told_before_anything_runs(collected: Path, tmp_path: Path) -> None:
    folder = copy(collected, tmp_path / "clips")
    model = ["--family", "hunyuan_video", "--task", "t2v", "--memory", "12"]
    assert run_here("new_project.py", folder, "--overwrite", *model, folder=tmp_path) == (0, "")
    code, said = run_here("run_project.py", folder, folder=tmp_path)
    words = "--family hunyuan_video --task t2v --fp8_encoders --to", str(tmp_path / "models")
    assert_one_message(code, said, "mp_rank_00_model_states.pt is missing", "--download", *words)


NO_COMMANDS = (
    "rm -rf x|python ../x.py|python|python run_project.py .|python tools/caption_dataset.py --api http://x"
)


@pytest.mark.parametrize("words", [line.split() for line in NO_COMMANDS.split("|")])
def test_only_commands_of_ours_are_run(words: list[str], collected: Path, tmp_path: Path) -> None:
    text = (collected / "run.toml").read_text(encoding="utf-8")
    changed = re.sub("^commands.*$", f"commands = [[], {words}]", text, flags=re.MULTILINE)
    (tmp_path / "run.toml").write_text(changed, encoding="utf-8")
    assert_one_message(*run_here("run_project.py", tmp_path, folder=tmp_path), "is not a command", "Fix")


def test_no_code_of_the_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_network.py").write_text("open('it ran', 'w').close()", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv(RUN_GOES_ON, "1")
    with pytest.raises(OptionError, match="takes no code from its folder"):
        import_network_module("hostile_network")
    monkeypatch.delenv(RUN_GOES_ON)
    monkeypatch.setenv(FROM_QUEUE, "1")
    for use in (import_network_module, import_prompter):
        with pytest.raises(OptionError, match="The queue takes no code from a folder"):
            use("hostile_network" if use is import_network_module else "hostile_network.py")
    assert not (tmp_path / "it ran").exists()

    monkeypatch.delenv(FROM_QUEUE)  # typed by the user
    with pytest.raises(OptionError, match="builds no network"):
        import_network_module("hostile_network")
    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize("text", [None, "", "[reelsmith]\ncommands = 3", "\x00"])
def test_a_folder_that_is_not_described_is_one_message(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    remedy = "Describe the folder first: python reelsmith.py new" if text is None else "run `new` again"
    assert_one_message(*run_here("run_project.py", tmp_path, folder=tmp_path), "run.toml", remedy)


def test_a_dry_run_shows_the_download_of_what_is_missing(collected: Path, tmp_path: Path) -> None:
    text = (collected / "run.toml").read_text(encoding="utf-8").replace("pocket/dit", "pocket/missing")
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")

    said = run_script("run_project.py", tmp_path, "--dry_run").stdout

    assert "tools/download.py" in said
    assert "--config_file" in said


def test_the_first_failure_ends_the_run(collected: Path, tmp_path: Path) -> None:
    folder = copy(collected, tmp_path / "clips")
    (folder / "b.txt").unlink()
    run_script("new_project.py", folder, *MODEL, "--overwrite")
    done = run_script("run_project.py", folder, check=False)
    assert done.returncode == 1
    assert done.stdout.count("$ python") == 1
    assert "b.mkv" in done.stdout
    (command,) = [line for line in done.stdout.splitlines() if "caption_dataset" in line]
    assert 'class_tokens = "WORD"' in done.stdout
    # it works where it says
    told = run_here("tools/caption_dataset.py", *shlex.split(command)[2:], folder=folder)
    assert_one_message(*told, "--model Qwen/Qwen2-VL-2B-Instruct", "cannot be downloaded from the hub")
    told = run_here(
        "tools/dataset_report.py", "--dataset_config", folder / "dataset.toml", "--json", folder=tmp_path
    )
    assert_one_message(*told, "has no videos", f"`cd {folder}`")


def dump_environment(path: Path) -> str:
    """A command that writes its folder and its environment as JSON, as it is typed behind --on_end."""
    code = "import json, os, sys; json.dump({'cwd': os.getcwd(), **os.environ}, open(sys.argv[1], 'w'))"
    return shlex.join([sys.executable, "-c", code, str(path)])


def test_the_command_at_the_end_is_typed_and_told_what_failed(collected: Path, tmp_path: Path) -> None:
    folder = copy(collected, tmp_path / "clips")
    (folder / "b.txt").unlink()
    path = tmp_path / "said.json"
    words = "--on_end", dump_environment(path)

    checked = run_here("run_project.py", folder, "--check", *words, folder=tmp_path)
    assert checked[0] == 1
    assert not path.exists()

    code, _ = run_here("run_project.py", folder, *words, folder=tmp_path)

    told = json.loads(path.read_text(encoding="utf-8"))
    assert told["cwd"] == str(tmp_path)  # not the described folder, which may have programs of that name
    assert (told["REELSMITH_STATE"], told["REELSMITH_EXIT_CODE"], code) == ("failed", "1", 1)
    assert told["REELSMITH_OUTPUT_DIR"] == str(folder / "output")
    assert (told["REELSMITH_OUTPUT_NAME"], told["REELSMITH_STEPS"]) == ("my_clips", "2")
    assert not any(name.startswith("REELSMITH_RUN_") for name in told)


@pytest.mark.parametrize(("place", "remedy"), [("training", "Omit it"), ("commands", "Remove it")])
def test_a_described_folder_starts_no_program(
    place: str, remedy: str, collected: Path, tmp_path: Path
) -> None:
    folder = copy(collected, tmp_path / "clips")
    text = (folder / "run.toml").read_text(encoding="utf-8")
    path = tmp_path / "it ran.json"
    command = dump_environment(path)
    if place == "training":
        text = text.replace("[training]\n", f"[training]\non_end = {toml_value(command)}\n")
    else:
        commands = parse_toml(text)["reelsmith"]["commands"]
        commands[-1] += ["--on_end", command]
        line = f"commands = {toml_value(commands)}"
        text = re.sub("^commands = .*$", lambda _: line, text, flags=re.MULTILINE)
    (folder / "run.toml").write_text(text, encoding="utf-8")

    told = run_here("run_project.py", folder, folder=tmp_path)

    assert_one_message(*told, "on_end starts a program", remedy)
    assert not (folder / "cache").exists()
    assert not path.exists()


def test_a_misspelt_option_ends_the_run_before_anything_is_cached(collected: Path, tmp_path: Path) -> None:
    folder = copy(collected, tmp_path / "clips")
    text = (folder / "run.toml").read_text(encoding="utf-8").replace("learning_rate", "learning_rat")
    (folder / "run.toml").write_text(text, encoding="utf-8")
    told = run_here("run_project.py", folder, folder=tmp_path)
    assert_one_message(*told, "Did you mean learning_rate?")
    assert run_here("run_project.py", folder, "--check", folder=tmp_path) == told
    assert not (folder / "cache").exists()


def test_a_check_loads_torch_once_and_starts_no_process(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(collected, tmp_path / "clips")
    printed = io.StringIO()
    interrupt = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(subprocess, "Popen", None)

    code, said = run_here("run_project.py", folder, "--check", folder=tmp_path, printed=printed)

    assert code == 0, said
    assert printed.getvalue().count("Nothing is wrong.") == 2
    assert RUN_GOES_ON not in os.environ
    assert signal.getsignal(signal.SIGINT) == interrupt
    assert "WARNING" not in said
    (folder / "b.txt").unlink()
    code, said = run_here("run_project.py", folder, "--check", folder=tmp_path, printed=printed)
    assert code == 1


@pytest.mark.slow
def test_a_file_of_another_kind_ends_the_run_before_anything_is_cached(
    collected: Path, tmp_path: Path
) -> None:
    folder = copy(collected, tmp_path / "clips")
    text = (folder / "run.toml").read_text(encoding="utf-8")
    (folder / "run.toml").write_text(text.replace("pocket/dit", "pocket/vae"), encoding="utf-8")
    told = run_here("run_project.py", folder, folder=tmp_path)
    assert_one_message(*told, "vae.safetensors is not", "Pass")
    assert not (folder / "cache").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is a signal to the group elsewhere")
def test_ctrl_c_ends_the_command_and_the_run(collected: Path, tmp_path: Path) -> None:
    folder = copy(collected, tmp_path / "clips")
    words = [sys.executable, str(ROOT / "reelsmith.py"), "run", str(folder)]
    settings: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "process_group": 0}
    # a shell's job in the background ignores Ctrl-C, and so does what it starts
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(words, env={**os.environ, **QUIET}, **settings) as process:
        signal.signal(signal.SIGINT, kept)
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith(("tokenizer", "Files")))
        os.killpg(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "The same command continues: python " in errors
    assert f"reelsmith.py run '{folder}'" in errors or f"reelsmith.py run {folder}" in errors
    assert "wan_train_network.py" not in said


MODELS = find_models()
EDIT = {
    "flux_kontext",
    "flux_2",
    "flux_3",
    "qwen_image_21",
    "moss_image",
    "fibo_2",
}  # besides releases of others
WRITTEN = ["dataset.toml", "prompts.txt", "run.toml"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copied = tmp_path_factory.mktemp("collected") / "my clips"
    write_folder(copied)
    return copied


@pytest.fixture
def copied(raw: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(raw, tmp_path / "my clips"))


def describe(copied: Path, *words: object, model: ModelSet = MODELS[0]) -> tuple[int, str]:
    names = ["--family", model.family, "--task", model.task]
    return run_here("new_project.py", copied, *names, *words, folder=copied.parent)


# Models with tiny files: tests/project/test_kinds_of_folders.py describes each of them and checks it with its
# files every day. One stays, whose clips are too short here.
TAKES = [
    pytest.param(model, id=name, marks=[pytest.mark.slow] * (name in TINY and name != "minimax_h3 fl2va"))
    for model in MODELS
    for name in [f"{model.family} {model.task}"]
]


@pytest.mark.parametrize("model", TAKES)
def test_every_model_takes_what_is_written(model: ModelSet, copied: Path) -> None:
    data, step = model.properties, model.properties.get("frame_step", 4)
    script = next(word for word in shlex.split(model.commands["train"]) if word.endswith(".py"))

    (copied / "control").mkdir()
    for stem in "ghijkl":
        shutil.copy(copied / "i.png", copied / "control" / f"{stem}.png")
    # the folder control would make a run of a control network
    kind = ("--train", "lora") if find_control_kind(model) else ()
    told = describe(copied, "--memory", 12, "--trigger_word", "mrsfluff", *kind, model=model)
    if model.task == "av":  # it learns sound, and the clips are silent
        assert_one_message(*told, "has no sound", "Use clips that have some, or take --task v")
        assert not (copied / "run.toml").exists()
        return
    if "--output_layers" in model.commands["generate"]:  # it learns pictures with their layers
        assert_one_message(*told, "have no layers, such as a_1.png")
        return
    if "least_frames" in data and data.get("from_image"):  # the clips are shorter
        assert_one_message(*told, "learns from clips of at least", "Choose another --family or --task")
        return
    # `run` works in the folder
    code, said = run_here(script, "--config_file", "run.toml", "--check", folder=copied)

    assert told == (0, "")
    # nothing is cached; a training adapter that is not on disk is a wrong option
    assert code == (2 if "--training_adapter" in said else 1)
    # models that are recognized by their file miss it
    known = "are animated", "no such file", " downloads it.", "it gives no rights"
    assert not [line for line in said.splitlines() if not any(words in line for words in known)]
    tables = load_dataset_config(copied / "dataset.toml").datasets
    assert not any(table.source.directory.is_absolute() for table in tables if table.source.directory)
    assert all(table.captions.trigger_word == "mrsfluff" for table in tables)
    for table in (table for table in tables if table.kind == "video"):
        assert (table.buckets.source_fps == "auto") is (data["frames"] > 1)
        assert table.buckets.target_frames[-1] % step == 1
        assert min(data["frames"], 1 + step) <= table.buckets.target_frames[-1] <= data["frames"]
        assert (1 in table.buckets.target_frames) is (not data.get("from_image"))
    kinds = {"video"} if data.get("from_image") else {"video", "image"}
    takes_clips = data["frames"] > 1 and "least_frames" not in data  # the clips are shorter
    assert {table.kind for table in tables} == (kinds if takes_clips else {"image"})
    prompts = (copied / "prompts.txt").read_text(encoding="utf-8").splitlines()
    quality = f"{data['tags']}, " if data.get("tags") else ""  # words that its pictures are rated by
    assert [line.startswith(f"{quality}mrsfluff, ") for line in prompts] == [True, True, False]
    edits = [table for table in tables if table.references.control_directory is not None]
    # samples of edits are instructions of the dataset; other samples show what no caption mentions
    assert any("a square moves" in line for line in prompts) is bool(edits)
    assert bool(edits) is ("--ci " in prompts[0]) is (model.family in EDIT or model.task.startswith("edit"))
    values = parse_toml((copied / "run.toml").read_text(encoding="utf-8"))["training"]
    assert values["network_alpha"] in {values["network_dim"], values["network_dim"] / 2}
    assert (values["sample_at_first"], values["sample_now"], values["validation_split"]) == (True, True, 0.1)


@pytest.mark.parametrize(("memory", "form"), [(0, None), (8, "nf4_base"), (24, "convrot_int8"), (80, None)])
def test_options_follow_from_the_card(memory: int, form: str | None, copied: Path) -> None:
    [large] = [model for model in MODELS if (model.family, model.task) == ("wan", "t2v-14B")]
    describe(copied, "--memory", memory, model=large)
    values = parse_toml((copied / "run.toml").read_text(encoding="utf-8"))["training"]
    assert values.get("blocks_to_swap") == ("auto" if memory else None)
    forms = [name for name in ("fp8_base", "fp8_scaled", "convrot_int8", "nf4_base") if name in values]
    assert forms == ([] if form is None else [form])  # of 26.6 GiB of weights; docs/small_cards.md
    assert ("gradient_checkpointing_cpu_offload" in values) is (0 < memory <= 16)
    assert ("fp8" in values["t5"]) is (0 < memory < 16)


def test_what_does_not_fit_is_told(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copied / "b.txt").unlink()
    (copied / "a.mp4").write_bytes(b"no clip")
    shutil.copytree(copied, copied / "more")
    shutil.copytree(copied, copied / "cache")

    done = run_script("new_project.py", copied, "--family", "wan", "--task", "i2v-14B-480p", "--memory", "0")

    said = done.stdout
    assert f"{copied}: 14 clips and 8 images. wan i2v-14B-480p at 96x64, 21 frames, on a CPU" in said
    assert f"no video in {copied / 'a.mp4'}" in said or str(copied / "a.mp4") in said
    assert "b.mkv, b.mkv: without a caption" in said
    assert "i.png, j.jpg, k.webp and 5 more: images, which this model cannot train on" in said
    assert load_dataset_config(copied / "dataset.toml").datasets[1].source.directory == Path("more")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--family wan", "--task is missing: pass one of t2v-1.3B ("),
        ("--task t2v-1.3B", "--family is missing: pass one of wan, "),
        ("--family won", "Did you mean wan?"),
        ("--family sdx", "Did you mean sdxl?"),
        (
            "--family ltx --task 2.3",
            "--task 2.3: that is the release of all of them. Choose from av (text or image to video with",
        ),
        ("--family hunyuan", "Did you mean hunyuan_video or hunyuan_image?"),
        ("--family sdxl --task 1.5", "--family names stable_diffusion xl, and --task 1.5 is 1.5. Omit one"),
        ("--family sd", "--task is missing: pass one of 1.5 ("),
        ("--family cosmos", "Cosmos is not supported. For images choose from "),
        ("other --family lumina", "other is not used: pass one folder, and put quotes around"),
        ("--family lumina --network_dim 4", "write network_dim = ... below [training] in run.toml"),
        ("--family lumina --num_repeats 2", "a key of the dataset file: write num_repeats = ..."),
        ("--family lumina --memory 12TB", "'12TB' is not an amount of memory. Pass GiB, such as 12"),
        ("--family lumina --model_file dit=short", "short is a folder without exactly one model"),
        ("--family qwen --task edit", "there is no image to edit from"),
        ("--family lumina --model_file vae=x", "--model_file vae=x: pass NAME=PATH with one of dit, "),
        (
            "--family lumina --model_file dit=~nobody9/x",
            "--model_file dit '~nobody9/x': there is no such user",
        ),
        ("--family lumina --model_file dit='missing.pt'", "there is no such file"),
        ("--family lumina --model_file dit=missing.pt", "dit=missing.pt: there is no such file"),
        ("--family lumina --model_file my.pt", "--model_file my.pt: pass NAME=PATH with one of dit, "),
        ("--family lumina --model_file dit=a --model_file dit=b", "dit: a and b are given. Pass one of them"),
        ("--family wan --task t2v-1.4B", "--task t2v-1.4B: choose from t2v-1.3B, "),
        ("--family lumina --card 12", "--memory 12"),
        ("--family lumina --output_name ../x", "it contains a folder"),
        ("--family lumina --output_name CON", "on Windows CON is a device"),
        ("--family lumina --output_name a:b", "names on Windows cannot have the character :"),
        ("--family lumina --output_name a\x1b[2J", "it contains control codes"),
        ("--family lumina --trigger_word a\x1b]0;x\x07", "a control code or a line break"),
        ("--family lumina --trigger_word a\u2028b", "a control code or a line break"),
        ("--family framepack --task f1", "--task f1 learns from clips of at least 1.2 seconds"),
    ],
)
def test_what_cannot_be_written_is_one_message(words: str, told: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "short", seconds=0.5)
    code, said = run_here("new_project.py", "short", *words.split(" "), folder=tmp_path)
    assert_one_message(code, said, told)
    assert not set(WRITTEN) & {path.name for path in (tmp_path / "short").iterdir()}


@pytest.mark.parametrize("name", WRITTEN)
def test_no_file_is_replaced_unasked(name: str, copied: Path) -> None:
    (copied / name).write_text("mine", encoding="utf-8")
    assert_one_message(*describe(copied), name, "--overwrite")
    assert (copied / name).read_text(encoding="utf-8") == "mine"
    assert describe(copied, "--overwrite") == (0, "")
    assert (copied / name).read_text(encoding="utf-8") != "mine"


CAPTION = "mrsfluff, a square moves"


def write_folder(folder: Path, seconds: float = 1.5, size: tuple[int, int] = (96, 64)) -> None:
    """Write 12 files: clips of four containers and three rates, animations, pictures; all have captions."""
    folder.mkdir()
    clips = [("a.mp4", 30), ("b.mkv", 24), ("c.webm", 25), ("d.mov", 16), ("e.mp4", 60), ("f.avi", 30)]
    for seed, (name, rate) in enumerate(clips):
        frames = moving_square(round(seconds * rate), *size, seed)
        _write_clip(folder / name, frames, rate, "libvpx" if name.endswith("webm") else "libx264")
    for seed, name in enumerate(("g.gif", "h.webp")):
        first, *others = map(Image.fromarray, moving_square(round(seconds * 20), *size, seed))
        first.save(folder / name, save_all=True, append_images=others, duration=50)
    for seed, name in enumerate(("i.png", "j.jpg", "k.webp", "l.bmp")):
        Image.fromarray(moving_square(1, *size, seed)[0]).save(folder / name)
    for path in sorted(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"{CAPTION} {path.stem}", encoding="utf-8")


def _write_clip(path: Path, frames: Sequence[Frame], rate: int, codec: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def test_run_says_that_it_continues_by_itself(tmp_path: Path) -> None:
    told = "`run` continues by itself: type the same command again"
    for words in ("--resume latest", "--resume="):
        code, said = run_here("run_project.py", tmp_path, *words.split(), folder=tmp_path)
        assert_one_message(code, said, told, remedy=False)


def test_a_folder_of_repeats_names_the_folder_around_it(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "10_ohwx man"
    folder.mkdir(parents=True)
    with pytest.raises(DatasetError, match="pass its parent folder") as error:
        folders_config(SubsetOptions(train_data_dir=folder, resolution="512"))
    assert str(folder.parent) in str(error.value)


def test_a_folder_around_that_of_the_folders_of_repeats_names_it(tmp_path: Path) -> None:
    (tmp_path / "cat" / "train" / "10_ohwx cat").mkdir(parents=True)
    (tmp_path / "cat" / "log").mkdir()
    with pytest.raises(DatasetError) as error:
        folders_config(SubsetOptions(train_data_dir=tmp_path / "cat", resolution="512"))
    assert str(error.value).endswith(f"Pass {tmp_path / 'cat' / 'train'}.")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("models", "download --list"),
        ("gui", "browser"),
        ("convert-lora", "convert"),
        ("convert_lora.py", "convert"),
    ],
)
def test_a_command_of_another_name_is_known(word: str, meant: str, tmp_path: Path) -> None:
    said = run_program(sys.executable, ROOT / "reelsmith.py", word, folder=tmp_path, check=False).stderr
    assert f"'{word}' is not a command. Did you mean " in said
    assert f"{meant}?" in said


def test_the_list_of_options_is_named_by_a_command_that_any_folder_takes(tmp_path: Path) -> None:
    words = [ROOT / "reelsmith.py", "new", "--famly", "wan"]
    said = run_program(sys.executable, *words, folder=tmp_path, check=False).stderr
    # without the checkout's path, which `run_program` takes away
    assert said.strip().splitlines()[-1] == "python reelsmith.py new --help lists all options"


@pytest.mark.parametrize(("typed", "trained"), [("video", "v"), ("v", "v"), ("va", "av")])
def test_a_mode_in_another_spelling_is_no_other_model(typed: str, trained: str) -> None:
    commands = [["python", "ltx2_cache_latents.py"], ["python", "ltx2_train_network.py"]]

    metadata = _make_model_metadata({"ltx_mode": typed}, commands)

    assert metadata == {"ss_ltx_mode": trained}


def test_what_a_check_has_found_good_is_not_checked_again(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(collected, tmp_path / "clips")
    done: list[str] = []
    monkeypatch.setattr(running, "_check_training", lambda *_, **__: done.append("options"))
    monkeypatch.setattr(running, "_check_media", lambda *_: (done.append("media"), MediaCheck([], []))[1])
    monkeypatch.setattr(running, "run_command", lambda words, *_: 0)
    monkeypatch.setattr(running, "_run_here", lambda words, *_, **__: 0)

    def run(**options: bool) -> list[str]:
        done.clear()
        running.run_project(RunOptions(folder=folder, **options))
        return list(done)

    assert run() == ["options", "media"]  # nothing is remembered by a run itself
    assert run(check=True) == ["options", "media"]
    assert run() == []
    assert "Checked already, and nothing has changed since" in capsys.readouterr().out
    (folder / "b.txt").write_text("another caption", encoding="utf-8")
    assert run() == ["options", "media"]
    assert run(check=True) == ["options", "media"]  # a check is always made
    assert run() == []
    run_toml = folder / "run.toml"
    run_toml.write_text(f"{run_toml.read_text(encoding='utf-8')}\n# mine\n", encoding="utf-8")
    assert run() == ["options", "media"]
    run(check=True)
    (folder / "more").mkdir()
    (folder / "more" / "c.jpg").write_bytes(b"x")
    assert run() == ["options", "media"]


def test_a_check_that_left_files_out_is_made_again(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(collected, tmp_path / "clips")
    monkeypatch.setattr(running, "_check_training", lambda *_, **__: None)
    monkeypatch.setattr(running, "_check_media", lambda *_: MediaCheck([], ["a.jpg is damaged"]))
    running.run_project(RunOptions(folder=folder, check=True))
    assert not (folder / "cache" / "checked.json").exists()
