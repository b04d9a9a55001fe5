"""The memory of a described folder: the plan that a script prints becomes a bar, and switches are keys."""

import io
import os
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.folders.captions import compute_checksum
from browser.folders.draft_changes import describe_difference, read_keys
from browser.folders.training_settings import read_settings
from browser.pages.memory.memory_plan import ReadPlan, edit_switches, read_plan, read_size, read_switches
from modules.errors import OptionError
from runtime.planning.device_memory import DeviceMemory
from runtime.planning.memory_plan import MemoryPart, MemoryPlan, Phase, show, verdict
from tests.browser.drafts import RUN, unfold, write_draft
from tests.browser.serving import Answer, Served, serve_runs
from tests.chromium import open_page, wait_until
from tests.commands import ROOT
from training.reports.history import History, history_path

GIB = 1 << 30
SCRIPT = "wan_train_network.py"
PLANNED_WITHIN = 300_000  # milliseconds


def printed(plan: MemoryPlan, room: DeviceMemory | None = None, advice: tuple[str, ...] = ()) -> ReadPlan:
    """What the page reads of a plan that a script prints."""
    text = io.StringIO()
    with redirect_stdout(text):
        show(plan, verdict(plan, room, advice))
    read = read_plan(f"In the caches: 12 items\n{text.getvalue()}")
    assert read is not None
    return read


def plan_of(*phases: tuple[str, tuple[MemoryPart, ...]], remarks: tuple[str, ...] = ()) -> MemoryPlan:
    return MemoryPlan(tuple(Phase(name, parts) for name, parts in phases), remarks)


PARTS = (
    MemoryPart("weights of the transformer", 13 * GIB, 7 * GIB, "26.60 bfloat16; 20 blocks swapped"),
    MemoryPart("network (LoRA)", GIB // 4),
    MemoryPart("kept activations", 0, 2 * GIB, "the rest waits in host memory"),
    MemoryPart("optimizer", GIB // 2, note="of the LoRA"),
)


def names(*values: str) -> list[str]:
    return [setting.name for setting in read_settings(SCRIPT)] if not values else [*values]


def switch(text: str = RUN, **fields: str) -> list[str]:
    switches = read_switches(read_keys(text), names())
    present = {"swap": switches.swap, "weights": switches.weights, "checkpointing": switches.checkpointing}
    return describe_difference(text, edit_switches(text, switches, present | fields, names()))


def post(served: Served, what: str, folder: Path, run: str = RUN, **fields: str) -> Answer:
    body = urlencode({"folder": str(folder), "have": compute_checksum(run.encode()), "size": "24", **fields})
    origin = {"Origin": served.url, "Content_Type": "application/x-www-form-urlencoded"}
    return served.ask(f"/new/memory/{what}", "POST", body, **origin)


def test_the_bar_has_the_parts_that_the_script_prints() -> None:
    room = DeviceMemory("A card of 24 GiB", 24 * GIB, 24 * GIB, is_planned=True)
    plan = printed(
        plan_of(("training step, 832x480, 81 frames, batch 1", PARTS), remarks=("a remark",)), room
    )
    assert plan.phase.name == "training step, 832x480, 81 frames, batch 1"
    assert (plan.phase.device_gib, plan.phase.host_gib) == (13.75, 9.0)
    assert [(part.name, part.device_gib, part.host_gib) for part in plan.parts] == [
        ("weights of the transformer", 13.0, 7.0),
        ("network (LoRA)", 0.25, 0.0),
        ("kept activations", 0.0, 2.0),
        ("optimizer", 0.5, 0.0),
    ]
    assert plan.parts[0].note == "26.60 bfloat16; 20 blocks swapped"
    assert plan.parts[3].note == "of the LoRA"
    assert plan.remarks[0] == "a remark"
    assert plan.fits is True
    shares = {part.name: share for part, share in plan.segments(24.0)}
    assert shares["weights of the transformer"] == pytest.approx(100 * 13 / 24)
    assert shares["CUDA itself"] == pytest.approx(100 * plan.cuda_gib / 24)
    assert plan.cuda_gib > 0.3


def test_what_does_not_fit_is_longer_than_the_card() -> None:
    room = DeviceMemory("A card of 12 GiB", 12 * GIB, 12 * GIB, is_planned=True)
    plan = printed(plan_of(("training step", PARTS)), room, ("--blocks_to_swap 30: 9.10 GiB fits",))
    assert plan.fits is False
    assert "--blocks_to_swap 30: 9.10 GiB fits" in plan.remarks
    assert sum(share for _, share in plan.segments(12.0)) == pytest.approx(100)
    assert plan.card_share(12.0) == pytest.approx(100 * 12 / (13.75 + plan.cuda_gib))


def test_of_several_phases_the_largest_is_shown() -> None:
    small = ("caching", (MemoryPart("weights of text encoders", GIB),))
    plan = printed(plan_of(small, ("training step", PARTS)))
    assert plan.phase.name == "training step (largest)"
    assert plan.fits is None


@pytest.mark.parametrize(
    "text", ["", "OptionError: no such file\n", "Memory plan\nGiB  device  host\nnothing\n"]
)
def test_what_is_no_plan_is_none(text: str) -> None:
    assert read_plan(text) is None


def test_switches_are_keys_of_the_file() -> None:
    assert switch(swap="20") == ["+blocks_to_swap = 20"]
    assert switch(swap="auto") == ['+blocks_to_swap = "auto"']
    assert switch(weights="fp8") == ["+fp8_base = true", "+fp8_scaled = true"]
    assert switch(weights="nf4") == ["+nf4_base = true"]
    line = "gradient_checkpointing = true  # half of the memory"
    assert switch(checkpointing="") == [f"-{line}"]
    assert switch(checkpointing="offloaded") == ["+gradient_checkpointing_cpu_offload = true"]
    assert switch() == []


def test_another_form_of_weights_replaces_the_first() -> None:
    text = RUN.replace("sdpa = true", "fp8_base = true\nfp8_scaled = true\nblocks_to_swap = 3")
    assert read_switches(read_keys(text), names()).weights == "fp8"
    assert switch(text, weights="int8") == ["-fp8_base = true", "-fp8_scaled = true", "+convrot_int8 = true"]
    assert switch(text, weights="", swap="") == [
        "-fp8_base = true",
        "-fp8_scaled = true",
        "-blocks_to_swap = 3",
    ]


def test_only_what_the_model_has_is_offered() -> None:
    switches = read_switches({}, names("fp8_base", "gradient_checkpointing"))
    assert switches.weight_choices == ["fp8"]
    assert switches.checkpointing_choices == ["recomputed"]
    assert not switches.can_swap


@pytest.mark.parametrize("text", ["", "0", "-3", "24x", "1e3", "nan", "24 --config_file x"])
def test_a_size_is_a_number(text: str) -> None:
    with pytest.raises(OptionError, match="enter the GiB of the card"):
        read_size(text)


def test_missing_files_of_the_model_are_named(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served:
        page = served.ask(f"/new/memory?folder={quote(str(folder))}").text
        assert "A plan reads the headers of files that are missing" in page
        assert "<code>dit.safetensors</code>" in page
        answer = post(served, "plan", folder)
    assert answer.status == 422
    assert "dit.safetensors is missing." in answer.text
    assert not list((tmp_path / "reelsmith-queue").rglob("plan-*"))


def test_a_wrong_switch_is_refused_with_the_message_of_the_script(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served:
        answer = post(served, "switch", folder, swap="many", checkpointing="recomputed")
    assert answer.status == 422
    assert "blocks_to_swap" in answer.text.partition("</p>")[0]
    assert (folder / "run.toml").read_text(encoding="utf-8") == RUN


def test_a_switch_for_an_earlier_file_is_refused(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    theirs = RUN.replace("seed = 42", "seed = 43")
    (folder / "run.toml").write_text(theirs, encoding="utf-8")
    with serve_runs(tmp_path) as served:
        answer = post(served, "switch", folder, swap="4", checkpointing="recomputed")
    assert answer.status == 422
    assert "has changed in the meantime" in answer.text
    assert (folder / "run.toml").read_text(encoding="utf-8") == theirs


def test_a_switch_is_written_also_if_no_plan_can_be_made(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path) as served:
        answer = post(served, "switch", folder, swap="4", checkpointing="recomputed")
    assert "Saved into run.toml: +blocks_to_swap = 4" in answer.text
    assert "dit.safetensors is missing." in answer.text
    assert "blocks_to_swap = 4" in (folder / "run.toml").read_text(encoding="utf-8")


def test_the_length_is_said_once_a_run_has_measured_it(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    address = f"/new/memory?folder={quote(str(folder))}"
    with serve_runs(tmp_path) as served:
        assert "seconds each" not in served.ask(address).text
        (folder / "output").mkdir()
        history = History(history_path(folder / "output", "fluff"), 1)
        for step in range(1, 4):
            history.add(step, loss=1.0, rates={"lr/unet": 1e-4}, seconds=9.0)
        history.flush()
        assert (
            "2000 steps take 5.0 hours: 9 seconds each, as measured in the run fluff."
            in served.ask(address).text
        )


def test_read_only_plans_nothing(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    with serve_runs(tmp_path, read_only=True) as served:
        assert "<button" not in served.ask(f"/new/memory?folder={quote(str(folder))}").text
        assert post(served, "plan", folder).status == 403


def wait_for_plan(page: Any, words: str = "") -> str:
    """Return what the page says once a plan with these words is made: it loads torch, on a busy machine."""
    status = page.locator("#memory .status", has_not_text="planning")
    status.filter(has_text=words).wait_for(timeout=PLANNED_WITHIN)
    return str(page.locator("#memory").inner_text())


@pytest.mark.slow
def test_a_plan_of_the_pocket_model_becomes_a_bar(tmp_path: Path) -> None:
    """Without caches the commands that make them are offered; a switch plans again."""
    files = {name: ROOT / "pocket" / f"{name}.safetensors" for name in ("dit", "vae", "t5")}
    if not all(path.exists() for path in files.values()):
        pytest.skip("the pocket model is not there")
    run = RUN
    for name, path in files.items():
        run = run.replace(f'"{name}.safetensors"', f'"{path}"')
    folder = write_draft(tmp_path, run=run)
    with serve_runs(tmp_path) as served, open_page(f"{served.url}/new?folder={quote(str(folder))}") as page:
        wait_until(page, "document.querySelector('#memory-form') !== null")
        unfold(page, "memory")
        page.get_by_role("button", name="Plan", exact=True).click()
        message = wait_for_plan(page)
        assert "Make the caches first" in message
        caching = f"cd {shlex.quote(str(folder))} && python"
        assert message.count(caching) == 3  # two commands for caches, and that of the plan
        make_caches(folder, files)
        page.get_by_label("Card of").select_option("12")
        wait_for_plan(page, "of 12 GiB")
        assert page.locator(".memory-bar i").count() > 1
        page.get_by_label("Blocks swapped").fill("2")
        page.get_by_label("Blocks swapped").press("Tab")
        page.locator("#memory").get_by_text("+blocks_to_swap = 2").wait_for(timeout=PLANNED_WITHIN)
        assert "fits" in wait_for_plan(page)
        assert "--plan 12" in page.locator("#memory-form").inner_text()
        assert page.problems == []
    assert "blocks_to_swap = 2" in (folder / "run.toml").read_text(encoding="utf-8")


def make_caches(folder: Path, files: dict[str, Path]) -> None:
    """Cache a folder with the pocket model."""
    for script, option in (("wan_cache_latents", "vae"), ("wan_cache_text_encoder_outputs", "t5")):
        words = [
            sys.executable,
            ROOT / f"{script}.py",
            "--dataset_config",
            "dataset.toml",
            f"--{option}",
            files[option],
        ]
        subprocess.run(
            words, cwd=folder, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
