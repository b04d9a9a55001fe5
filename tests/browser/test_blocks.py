"""The page Blocks: strengths as text and sliders, previews with one seed, findings, profiles, new files."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.jobs.jobs import JobQueue
from browser.jobs.render_worker import RenderWorker
from browser.jobs.sessions import find_session
from browser.pages.blocks.measured import REMEDIES, SENTENCES, diagnosis_path, profile_path
from browser.pages.blocks.strengths import apply_text, format_strengths, read_blocks, read_preset
from browser.runs.runs import FINISHED
from modules.errors import OptionError
from modules.media.reading import first_frame
from modules.text_files import parse_json
from pocket.measure import POCKET
from tests.browser.serving import Answer, Served, plain_text, serve_runs, write_run
from tests.browser.test_accessible import MISSED, assert_fits
from tests.browser.test_render_worker import start_fake
from tests.chromium import open_page, wait_until
from tests.commands import QUIET, ROOT
from tests.waiting import wait_for
from training.reports.history import History, history_path

METADATA = {"ss_base_model_version": "wan", "ss_network_module": "networks.lora_wan"}
FLUX = read_blocks([f"double_blocks_{number}" for number in range(4)] + ["single_blocks_0", "other"])
WAN = read_blocks([f"blocks_{number}" for number in range(12)])


def write_lora(path: Path, seed: int = 0) -> None:
    """Write a LoRA of the pocket model with two modules in each block."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(POCKET / "dit.safetensors").items():
        module, _, end = name.rpartition(".")
        if end == "weight" and module.endswith((".self_attn.q", ".ffn.0")):
            ours = f"lora_unet_{module.replace('.', '_')}"
            rows, columns = weight.shape
            tensors[f"{ours}.lora_down.weight"] = torch.randn(2, columns, generator=generator) / 4
            tensors[f"{ours}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) / 4
            tensors[f"{ours}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path, METADATA)


def write_lora_run(folder: Path) -> Path:
    """Write a run of the pocket model with a LoRA, and return the path of the LoRA."""
    write_run(folder, "x")
    lora = folder / "x.safetensors"
    write_lora(lora)
    models = " ".join(f"--{part} '{POCKET / part}.safetensors'" for part in ("dit", "vae", "t5"))
    command = (
        f"python wan_generate_video.py --task t2v-1.3B {models} --flow_shift 3.0 --lora_weight '{lora}' "
    )
    command += "--prompt 'a square' --video_size 48 64 --video_length 5 --infer_steps 2 --guidance_scale 1.0 "
    command += "--seed 5 --save_path out"
    history = History(history_path(folder, "x"), 1, 6)
    history.add(6, commands=[["Generate with it", command, command, ""]])
    history.flush()
    return lora


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora_run(tmp_path / "ä b" / "out")


@contextlib.contextmanager
def serve(folder: Path, find_program: Any = start_fake, **options: Any) -> Iterator[Served]:
    """Serve the page, by default with a process that only seems to generate."""
    queue = JobQueue(folder / "reelsmith-queue", bool(options.get("read_only")))
    worker = RenderWorker(queue, find_program)
    try:
        with serve_runs(folder, queue=queue, render_worker=worker, **options) as served:
            yield served
    finally:
        worker.close()


@pytest.fixture
def served(lora: Path) -> Iterator[Served]:
    with serve(lora.parent) as served:
        yield served


def show(served: Served, **fields: str) -> str:
    answer = served.ask(f"/blocks?{urlencode(fields)}")
    assert answer.status == 200, answer.text
    return plain_text(answer.text)


def show_rejected(served: Served, **fields: str) -> str:
    answer = served.ask(f"/blocks?{urlencode(fields)}")
    assert answer.status == 422, answer.text
    return plain_text(answer.text)


def press(served: Served, button: str, **fields: str) -> Answer:
    return served.ask(f"/blocks/{button}", "POST", urlencode(fields), Origin=served.url)


def write_measured(lora: Path) -> None:
    """Write what both tools write, with a finding that the page knows and one that it does not."""
    diagnosis_path(lora).parent.mkdir(exist_ok=True)
    loud = {"id": "lora-one-block", "subject": "blocks_1", "figure": 0.83, "limit": 0.6}
    other = {"id": "lora-newer", "subject": "x", "figure": 1.0, "limit": 1.0, "text": "A new <b>finding."}
    for finding in (loud, other):
        finding |= {"meaning": "It means.", "remedy": "Change --this.", "text": finding.get("text", "Loud.")}
    blocks = [{"block": f"blocks_{number}", "modules": 2, "norm": 1.5 + number} for number in range(2)]
    diagnosis: dict[str, Any] = {"findings": [loud, other], "remarks": [], "blocks": blocks}
    diagnosis_path(lora).write_text(json.dumps(diagnosis), encoding="utf-8")
    rows = [
        {
            "block": f"blocks_{number}",
            "norm": 1.5 + number,
            "shares": [0.865, 0.25],
            "shares_of_frames": [0.5],
        }
        for number in range(2)
    ]
    profile = {"sigmas": [1.0, 0.5], "changes": [0.16, 0.2], "frames": [0], "blocks": rows, "prompts": ["ä"]}
    profile_path(lora).write_text(json.dumps(profile), encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "blocks", "expected"),
    [
        ("0-9=0.5, 11-=0", WAN, "0-9=0.5,11=0"),
        ("0-11=0.5,3=1", WAN, "0-2=0.5,4-11=0.5"),
        ("0=1", WAN, ""),
        ("double_blocks:1-2=1.2,other=0", FLUX, "double_blocks:1-2=1.2,other=0"),
        ("single_blocks:0-=-0.25", FLUX, "single_blocks:0=-0.25"),
    ],
)
def test_a_text_sets_the_strengths_of_blocks_and_is_written_shortest(
    text: str, blocks: Any, expected: str
) -> None:
    strengths = apply_text(text, blocks)
    assert format_strengths(strengths) == expected
    assert apply_text(expected, blocks) == strengths


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("half", "Strengths half: write blocks and their strength"),
        ("@/etc/passwd", "Strengths @/etc/passwd: write blocks"),
        ("12=0", "the file has no such block. It has 0-11"),
        ("other=0", "the file has no such block"),
    ],
)
def test_texts_that_set_nothing_are_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        apply_text(text, WAN)
    with pytest.raises(OptionError, match="double_blocks:0-3, single_blocks:0, other"):
        apply_text("1=0", FLUX)


def test_a_preset_has_an_item_a_line() -> None:
    assert read_preset("# face\n0-9=0.5,\n\n28-=0  # background\n") == "0-9=0.5,28-=0"
    with pytest.raises(OptionError, match="write blocks"):
        read_preset("root:x:0:0\n")


def test_the_page_is_reached_from_a_run_and_from_models(served: Served, lora: Path) -> None:
    run = served.of("x")
    assert 'id="show_blocks"' in served.ask(run).text
    assert 'hx-get="/blocks/loras"' in served.ask("/models").text
    listed = plain_text(served.ask("/blocks/loras").text)
    assert urlencode({"file": str(lora)}) in listed
    assert "Wan" in listed
    page = show(served, run=run.split("/")[2])
    assert 'value="a square"' in page
    assert "Diagnose the file to see its blocks as sliders." in page
    (lora.parent / "y.safetensors").write_bytes(b"none")
    assert "y.safetensors is not a LoRA." in show_rejected(served, file=str(lora.parent / "y.safetensors"))
    for path in (lora.parent.parent / "gone.safetensors", ROOT / "pocket" / "model" / "dit.safetensors"):
        assert "there is no such LoRA file below the folders." in show_rejected(served, file=str(path))


def test_findings_and_profile_are_those_in_the_files(served: Served, lora: Path) -> None:
    write_measured(lora)
    page = show(served, file=str(lora), text="0=0.5")

    assert "83% of the whole change is in blocks_1." in page
    assert "Halve blocks_1" in page
    assert "A new <b>finding." in page
    assert "It means. Change --this." in page
    assert "86.5%" in page
    assert "1.000" in page
    assert page.count('type="range"') == 2
    assert 'name="strength blocks_0" min="0" max="2" step="0.05" value="0.5"' in page
    weaker = show(served, file=str(lora), text="0=0.5", changed="weaken", block="blocks_1")
    assert 'name="text" value="0-1=0.5"' in weaker
    slid = {"file": str(lora), "text": "0=0.5", "changed": "block", "block": "blocks_1"}
    assert 'name="text" value="0=0.5,1=0.25"' in show(served, **slid, **{"strength blocks_1": "0.25"})
    preset = diagnosis_path(lora).with_name("face.txt")
    preset.write_text("1=0\n", encoding="utf-8")
    assert 'name="text" value="1=0"' in show(served, file=str(lora), changed="preset", preset=str(preset))
    preset.write_bytes(b"\xff1=0")
    rejected = show_rejected(served, file=str(lora), changed="preset", preset=str(preset))
    assert "it is not text in UTF-8." in rejected
    assert "It has 0-1." in show_rejected(served, file=str(lora), text="7=0")
    assert "Strength of blocks_1: use a number" in show_rejected(served, **slid, **{"strength blocks_1": "x"})


def test_both_results_have_the_same_seed_and_are_made_once(served: Served, lora: Path) -> None:
    write_measured(lora)
    making = lora.parent / "reelsmith-queue" / "making"
    fields = {"file": str(lora), "text": "0=0.5", "prompt": "a cat", "seed": "7", "live": "yes"}

    def list_requests() -> list[Mapping[str, Any]]:
        files = sorted(making.glob("[0-9]*.json"), key=lambda path: int(path.stem))
        return [parse_json(path.read_text(encoding="utf-8")) for path in files]

    assert press(served, "preview", **fields).status == 200
    wait_for(lambda: [row["state"] for row in list_requests()] == [FINISHED] * 2)
    assert press(served, "preview", **fields).status == 200
    rows = list_requests()
    assert [row["request"]["options"]["lora_blocks"] for row in rows] == [[""], ["0=0.5"]]
    assert {row["request"]["options"]["seed"] for row in rows} == {"7"}
    assert rows[0]["session"] == rows[1]["session"]
    assert rows[1]["command"][-2:] == ["--lora_blocks", "0=0.5"]
    page = served.ask(f"/blocks?{urlencode(fields)}").text
    assert [f'src="/blocks/shot/{number}"' in page for number in (1, 2, 3)] == [True, True, False]
    assert served.ask("/blocks/shot/1").status == 200
    assert served.ask("/blocks/shot/9").status == 404
    changed = served.ask(f"/blocks?{urlencode({**fields, 'text': '1=0', 'changed': 'text'})}")
    assert changed.headers["hx-trigger"] == "strengths"
    assert "/blocks/shot/2" not in changed.text


@pytest.mark.parametrize(
    ("button", "fields", "reason"),
    [
        ("preview", {"seed": "x"}, "Seed x: use a whole number"),
        ("preview", {"prompt": " "}, "Prompt: describe what to generate."),
        ("preview", {"multiplier": "much"}, "strength much of x.safetensors: use a number"),
        ("preview", {"text": "9=0"}, "the file has no such block."),
        ("profile", {"steps": "0"}, "Steps 0: use a number from 1"),
        ("bake", {"name": "new"}, "Nothing would change"),
        ("bake", {"name": "new", "donor_blocks": "1=1"}, "Nothing would change"),
        ("bake", {"name": "new", "text": "0=0", "donor_blocks": "1=1"}, "Choose the donor"),
        ("bake", {"name": "../new", "text": "0=0"}, "type one without folders"),
        ("bake", {"name": "x", "text": "0=0"}, "x.safetensors exists already"),
        ("diagnose", {"with_lora": "/etc/passwd"}, "there is no such LoRA file"),
    ],
)
def test_each_error_is_one_sentence_on_the_page(
    served: Served, lora: Path, button: str, fields: dict[str, str], reason: str
) -> None:
    write_measured(lora)
    answer = press(served, button, file=str(lora), **{"prompt": "a cat", **fields})
    assert answer.status == 422
    (said,) = [
        text
        for part in plain_text(answer.text).split('role="alert">')[1:]
        if (text := part.partition("</p>")[0])
    ]
    assert reason in said
    assert not (lora.parent / "reelsmith-queue" / "jobs.json").exists()


def test_findings_of_lora_files_have_words_of_the_page() -> None:
    sources = [ROOT / "diagnosis" / name for name in ("loras.py", "rounded_loras.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert {id for id in SENTENCES if f'"{id}"' in text} == SENTENCES.keys() == REMEDIES.keys()


@pytest.mark.slow
def test_each_button_runs_its_command_on_a_small_lora(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diagnosis, profile, previews, a new file and a donor; the new file gives the pixels of the preview."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    donor = lora.parent / "y.safetensors"
    write_lora(donor, seed=1)
    fields = {"file": str(lora), "prompt": "a red square", "seed": "7", "text": "0=0.5,1-=0"}
    with serve(lora.parent, find_session) as served:

        def page_with(text: str, **more: str) -> str:
            """The page, once it has a text."""
            wait_for(lambda: text in show(served, **{**fields, **more}), lambda: show(served, **fields))
            return show(served, **{**fields, **more})

        def read_shots(**more: str) -> list[Any]:
            """Press Preview, and return the pixels of both results."""
            sent = {**fields, **more}
            assert press(served, "preview", **sent).status == 200
            wait_for(
                lambda: show(served, **sent).count('src="/blocks/shot/') == 2, lambda: show(served, **sent)
            )
            numbers = [
                part.partition('"')[0] for part in show(served, **sent).split('src="/blocks/shot/')[1:]
            ]
            return [read_result(lora, number) for number in numbers]

        assert press(served, "diagnose", with_lora=str(donor), **fields).status == 200
        page_with("Nothing was found that explains")
        assert press(served, "profile", more="a blue circle --d 3", **fields).status == 200
        page = page_with("Shares of its effect")
        assert "a red square · a blue circle" in page
        queue = JobQueue(lora.parent / "reelsmith-queue", read_only=True)
        wait_for(lambda: [job.state for job in queue.jobs()] == [FINISHED])

        before, after = read_shots()
        assert (before != after).any()
        assert press(served, "bake", name="weaker", **fields).status == 200
        page_with("weaker.safetensors</a>")
        assert "weaker.safetensors" in served.ask("/blocks/loras").text
        baked = read_shots(file=str(lora.with_name("weaker.safetensors")), text="0=1")
        assert (baked[0] == after).all()

        taken = {"name": "mixed", "donor": str(donor), "donor_blocks": "0-=1", "text": ""}
        assert press(served, "bake", **{**fields, **taken}).status == 200
        page_with("mixed.safetensors</a>")
    mixed, theirs = load_file(lora.with_name("mixed.safetensors")), load_file(donor)
    assert {name: tensor.tolist() for name, tensor in mixed.items()} == {
        name: tensor.tolist() for name, tensor in theirs.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_sliders_change_the_text_and_ask_for_a_preview(served: Served, lora: Path, width: int) -> None:
    write_measured(lora)
    moved = "field => { field.value = %s; field.dispatchEvent(new Event('change', {bubbles: true})) }"
    with open_page(f"{served.url}/blocks?{urlencode({'file': str(lora)})}", width=width) as page:
        assert_fits(page)
        assert page.evaluate(MISSED) == []
        page.locator("#strength-blocks_1").evaluate(moved % 0.25)
        wait_until(page, "document.querySelector('#text').value === '1=0.25'")
        page.locator("[name=live]").check()
        page.locator("#strength-blocks_0").evaluate(moved % 0.5)
        wait_until(page, "document.querySelectorAll('#shots img').length === 2")
        page.get_by_role("button", name="Halve blocks_1").click()
        wait_until(page, "document.querySelector('#text').value === '0=0.5,1=0.125'")
        wait_until(page, "document.querySelectorAll('#shots img').length === 2")
        page.locator("#text").fill("half")
        page.locator("#text").blur()
        wait_until(page, "document.querySelector('#strengths .bad').textContent.includes('write blocks')")
        assert [problem for problem in page.problems if "422" not in problem] == []


def read_result(lora: Path, number: str) -> Any:
    """The first frame of a result by the number of its job."""
    stored = lora.parent / "reelsmith-queue" / "making" / f"{number}.json"
    return first_frame(Path(parse_json(stored.read_text(encoding="utf-8"))["file"]))
