"""The modes of a generation script and its session, with toy networks that note what happens to them."""

import builtins
import gc
import logging
import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import wan_generate_video
from generation import making
from generation.asking import line_reader
from generation.experts import ExpertOffloader
from generation.loaded_networks import Session, select_prompts
from generation.options import GenerationOptions, generation_parser, read_arguments
from generation.run import generate
from generation.script_options import ScriptDefaults
from modules.errors import CheckpointError, MemoryPlanError, OptionError, UserError
from modules.media.reading import video_frames
from modules.options import read_options
from protocols.data import MediaEncoders
from protocols.loading import Placement
from protocols.requests import Request
from tests.generation.toy_family import ToyFamily

DEFAULTS = ScriptDefaults(fps=16, guidance_scale=5.0)
COMMON = ["--device", "cpu", "--video_size", "32", "48"]


def options(folder: Path, *arguments: object, defaults: ScriptDefaults = DEFAULTS) -> GenerationOptions:
    words = [*COMMON, "--save_path", str(folder), *map(str, arguments)]
    if not defaults.in_sections:
        words = ["--video_length", "5", *words]
    return read_options(GenerationOptions, read_arguments(generation_parser(None, defaults), words))


def run(folder: Path, *arguments: object) -> list[str]:
    """What the toy networks noted, without the single passes."""
    family = ToyFamily()
    try:
        generate(family, options(folder, *arguments))
    finally:
        family.diary[:] = [line for line in family.diary if not line.startswith("pass")]
    return family.diary


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def prompts(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_one_prompt_makes_one_video_and_nothing_else(tmp_path: Path) -> None:
    diary = run(tmp_path / "out", "--prompt", "cat", "--seed", 7)
    assert diary == ["load text", "encode cat", "encode bad", "free text", "load dit", "load vae", "decode"]
    path = only(tmp_path / "out", "*")
    assert path.name.endswith("_7.mp4")
    assert [frame.shape for frame in video_frames(path)] == [(32, 48, 3)] * 5


def test_a_file_loads_each_network_once_and_goes_phase_by_phase(tmp_path: Path) -> None:
    path, out = (
        prompts(tmp_path, "cat --d 1", "# no", "dog --d 2 --i a.png", "cat --n worse"),
        tmp_path / "out",
    )
    assert run(out, "--from_file", path, "--output_type", "both") == [
        *["load text", "encode cat", "encode bad", "encode dog", "encode worse", "free text"],
        *["load vae", "encode a.png", "load dit"],
        *["load vae", "decode", "decode", "decode"],  # on a CPU it does not wait
    ]
    for kind in ("*.mp4", "*_latent.safetensors"):
        assert len(list(out.glob(kind))) == 3


def test_failing_lines_are_skipped_and_listed(tmp_path: Path) -> None:
    path = prompts(tmp_path, "impossible", "cat --i missing.png", "p --w x", "dog --d 5", "cat --cs 99")
    listed = (
        r"(?s)4 of 5 failed.*line 1: OptionError: this cannot.*line 3: OptionError: --w.*line 5.*"
        r"line 2: MediaError: missing.png"
    )
    with pytest.raises(UserError, match=listed) as caught:
        run(tmp_path / "out", "--from_file", path)
    assert caught.value.exit_code == 1
    assert only(tmp_path / "out", "*").name.endswith("_5.mp4")


@pytest.mark.parametrize("way", ["file", "conversation"])
def test_what_befalls_one_of_the_processes_that_share_a_model_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Else it begins the next prompt, while the others wait for the blocks of this one."""
    made: list[int] = []

    def fail(*_: object, **__: object) -> None:
        made.append(1)
        raise torch.OutOfMemoryError("the device is full")

    monkeypatch.setattr(making, "make_latents", fail)
    monkeypatch.setattr(builtins, "input", Typing("cat --d 1", "dog --d 2"))
    words = ["--from_file", prompts(tmp_path, "cat", "dog")] if way == "file" else ["--interactive"]

    with pytest.raises(UserError):
        run(tmp_path / "out", "--shard_base", *words)

    assert made == [1]


def test_latents_stay_where_decoding_fails(tmp_path: Path) -> None:
    with pytest.raises(MemoryPlanError, match=r"(?s)no room\..*--plan.*--latent_path"):
        generate(ToyFamily(can_decode=False), options(tmp_path, "--prompt", "cat", "--seed", 1))
    saved = only(tmp_path, "*")
    assert saved.name.endswith("_1_latent.safetensors")
    run(tmp_path / "again", "--latent_path", saved)
    assert only(tmp_path / "again", "*").name == saved.name.replace("_latent.safetensors", ".mp4")


def test_latents_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file({"latent": torch.zeros(16, 1, 2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="16 channels, the toy has 2"):
        run(tmp_path, "--latent_path", tmp_path / "x.safetensors")


def test_a_missing_model_is_said_once_and_not_for_every_line(tmp_path: Path) -> None:
    path = prompts(tmp_path, "cat", "dog")
    with pytest.raises(CheckpointError, match=r"--dit gone\.safetensors"):
        generate(ToyFamily(lost=Path("gone.safetensors")), options(tmp_path / "out", "--from_file", path))
    assert not (tmp_path / "out").exists()


def test_blocks_that_are_not_there_cannot_be_skipped(tmp_path: Path) -> None:
    more = ("--prompt", "cat", "--slg_mode", "uncond", "--output_type", "latent")
    run(tmp_path, *more, "--slg_layers", "0,1")
    with pytest.raises(OptionError, match="no block 2, the model has blocks 0 to 1"):
        run(tmp_path, *more, "--slg_layers", "0,2")


class Typing:
    """Stands for the keyboard: lines, or an exception to raise."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = iter(lines)
        self.signs: list[str] = []

    def __call__(self, sign: str) -> str:
        self.signs.append(sign)
        line = next(self.lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def test_a_conversation_keeps_networks_and_survives_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    typed = Typing("cat --d 1", "", "# note", KeyboardInterrupt, "impossible", "dog --d 2")
    monkeypatch.setattr(builtins, "input", typed)
    with caplog.at_level(logging.INFO):
        diary = run(tmp_path, "--interactive")
    assert typed.signs == ["> "] * 7
    assert diary == [
        *["load text", "encode cat", "encode bad", "move text", "load dit", "load vae", "decode"],
        *["move text", "encode dog", "move text", "decode"],
    ]
    assert "this cannot be made" in caplog.text
    assert "--lycoris" not in caplog.text  # it was not given
    assert sorted(path.name[-6:] for path in tmp_path.glob("*")) == ["_1.mp4", "_2.mp4"]


def test_the_bell_rings_on_a_terminal_after_each_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rings(*more: str) -> int:
        monkeypatch.setattr(builtins, "input", Typing("cat --d 1", "", "impossible", "dog --d 2"))
        run(tmp_path, "--interactive", *more)
        return capsys.readouterr().err.count("\a")

    assert rings("--bell") == 0  # it is a file
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert (rings("--bell"), rings()) == (3, 0)


def test_the_bell_rings_at_the_end_and_when_a_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OptionError("no")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    words = ["--prompt", "cat", "--save_path", str(tmp_path)]

    wan_generate_video.main(words, lambda *_: None)
    assert "\a" not in capsys.readouterr().err
    wan_generate_video.main([*words, "--bell"], lambda *_: None)
    with pytest.raises(OptionError):
        wan_generate_video.main([*words, "--bell"], fail)
    assert capsys.readouterr().err.count("\a") == 2


@pytest.mark.parametrize(
    "family",
    [
        {"interrupt_at": "a long one"},
        {"stop_loading": {"text"}},
        {"stop_loading": {"dit"}},
        {"stop_loading": {"media"}},
    ],
    ids=["denoising", "loading text", "loading dit", "loading media"],
)
def test_ctrl_c_abandons_only_the_current_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: dict[str, Any]
) -> None:
    monkeypatch.setattr(builtins, "input", Typing("a long one --d 1", "cat --d 2"))
    generate(ToyFamily(**family), options(tmp_path, "--interactive"))
    assert [path.name[-6:] for path in tmp_path.glob("*.mp4")] == ["_2.mp4"]


def test_ctrl_c_ends_a_batch_but_finished_latents_stay(tmp_path: Path) -> None:
    path = prompts(tmp_path, "cat --d 1", "a long one --d 2")
    with pytest.raises(KeyboardInterrupt):
        generate(ToyFamily(interrupt_at="a long one"), options(tmp_path / "out", "--from_file", path))
    assert only(tmp_path / "out", "*").name.endswith("_1_latent.safetensors")


def test_products_in_fp8_are_refused_at_start_where_the_device_has_none(tmp_path: Path) -> None:
    family = ToyFamily()
    with pytest.raises(OptionError, match=r"--fp8_fast: the device cpu has no fp8 units"):
        generate(family, options(tmp_path, "--prompt", "cat", "--fp8_scaled", "--fp8_fast"))
    assert family.diary == []


class BrokenFamily(ToyFamily):
    """A model, or a VAE, whose numbers overflow."""

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        dit = super().load_dit(placement, expert)
        if self.name == "toy":
            dit.scale.data = torch.full_like(dit.scale, math.nan)
        return dit

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        for chunk in super().decode(encoders, latents):
            yield chunk * math.inf


@pytest.mark.parametrize("output", ["video", "latent", "images"])
def test_what_is_not_a_number_is_an_error_and_no_grey_video(output: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="The model produced NaN or infinite"):
        generate(BrokenFamily(), options(out, "--prompt", "cat", "--output_type", output))
    assert list(out.iterdir()) == []
    with pytest.raises(UserError, match=r"The VAE produced NaN(.|\n)*--latent_path"):
        generate(BrokenFamily(name="good"), options(out, "--prompt", "cat"))
    assert not list(out.glob("*.mp4"))
    path = tmp_path / "bad.safetensors"
    save_file({"latent": torch.full((16, 2, 4, 4), math.nan)}, path)
    with pytest.raises(CheckpointError, match=r"bad.safetensors: its latents contain NaN"):
        generate(ToyFamily(), options(out, "--latent_path", path))


def test_on_a_terminal_prompt_toolkit_asks_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class PromptSession:
        def __init__(self, sign: str) -> None:
            self.sign = sign

        def prompt(self) -> str:
            return f"edited after {self.sign}"

    package = ModuleType("prompt_toolkit")
    package.PromptSession = PromptSession  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prompt_toolkit", package)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    assert line_reader([])() == "edited after > "


@pytest.mark.parametrize("end", ["quit", "exit", " Exit() ", ":q"])
def test_quit_ends_and_help_lists_the_options_of_a_line(
    end: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = iter(["help", "?", "a cat that wants to exit --d 1", end])
    monkeypatch.setattr("builtins.input", lambda sign: next(lines))
    with caplog.at_level(logging.INFO):
        read = line_reader([("w", "width"), ("d", "seed")])
        assert read() == "a cat that wants to exit --d 1"
    assert caplog.text.count("--d seed") == 2
    with pytest.raises(EOFError):
        read()


CPU = torch.device("cpu")


def session(family: ToyFamily, keep: bool) -> Session:
    def load(expert: int) -> nn.Module:
        return family.load_dit(Placement(CPU), expert)

    return Session(family, CPU, ExpertOffloader(family.experts, CPU, load, keep=keep))


def test_lines_of_one_prompt_keep_their_own_negative_text() -> None:
    requests = [Request("cat", 0, steps=3, guidance_scale=2.0, negative_prompt=text) for text in ("a", "bb")]
    found = session(ToyFamily(), keep=False).encode_texts(
        [select_prompts(ToyFamily().prepare(request)) for request in requests]
    )
    negatives = [by_section[0].negative for by_section in found]
    assert [float(negative["letters"][0]) for negative in negatives if negative is not None] == [1.0, 2.0]


def test_a_freed_network_is_really_gone() -> None:
    family = ToyFamily()
    freeing = session(family, keep=False)
    with freeing.dits.phase() as dit_at:
        dit = weakref.ref(dit_at(500.0))
    gc.collect()
    assert dit() is None
    with freeing.media(with_image_encoder=True, needed_again=True) as encoders:
        vae = weakref.ref(encoders.vae)
    del encoders  # on a CPU it does not wait
    gc.collect()
    assert vae() is None


def test_a_launcher_that_would_split_the_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(OptionError, match=r"ring attention.* pass --context_parallel N"):
        run(tmp_path / "out", "--prompt", "x")
