"""The worker of the page Generate: a model that stays loaded, what befalls it, and results to the bit."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from browser.jobs.jobs import WAITING, JobQueue
from browser.jobs.render_queue import ENDED_MEANWHILE, LOADING, RenderJob, RenderQueue
from browser.jobs.render_worker import RenderWorker
from browser.runs.recipes import ModelRecipe, RenderRequest, UsedLora
from browser.runs.runs import DIED, FINISHED, RUNNING, STOPPED
from modules.atomic_write import identify_machine
from modules.errors import OptionError, OutputError
from modules.media.reading import read_tags, video_frames
from pocket.measure import POCKET
from protocols.families import HIGH_NOISE
from tests.browser.lasting import lasting  # noqa: F401  # a fixture
from tests.commands import QUIET, ROOT, run_python
from tests.tiny.flux import write_tiny_flux
from tests.tiny.wan import write_tiny_wan
from tests.waiting import PATIENCE, wait_for

FAKE = Path(__file__).with_name("fake_driven.py")
MakeWorker = Callable[..., RenderWorker]


def start_fake(words: Sequence[str], folder: Path) -> tuple[object, list[str]]:
    return None, [sys.executable, str(FAKE), *words]


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobQueue:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    return JobQueue(tmp_path / "reelsmith-queue")


@pytest.fixture
def worker(queue: JobQueue) -> Iterator[RenderWorker]:
    worker = RenderWorker(queue, start_fake)
    yield worker
    worker.close()


def request(tmp_path: Path, prompt: str = "a cat", *words: str) -> RenderJob:
    save_path = str(tmp_path / "generated")
    return RenderJob(
        id=0,
        title="fake",
        session=[*words, "--save_path", save_path],
        command=["python", "fake.py"],
        request={"prompt": prompt, "options": {"seed": "7"}, "strengths": {}},
        folder=str(tmp_path),
        save_path=save_path,
        created=time.time(),
    )


def states(worker: RenderWorker) -> list[str]:
    return [making.state for making in worker.list_all()]


def wait_for_states(worker: RenderWorker, *expected: str) -> list[RenderJob]:
    wait_for(lambda: states(worker) == [*expected], lambda: str(worker.list_all()))
    return worker.list_all()


def test_one_process_makes_all_render_jobs_in_their_order(worker: RenderWorker, tmp_path: Path) -> None:
    assert worker.add([request(tmp_path, "first", "--noisy"), request(tmp_path, "second", "--noisy")]) == [
        1,
        2,
    ]
    first, second = wait_for_states(worker, FINISHED, FINISHED)
    assert [Path(first.file).name, Path(second.file).name] == ["0.png", "1.png"]
    assert json.loads(Path(second.file).read_text())["prompt"] == "second"
    assert worker.session is not None
    number = worker.session.process.pid
    worker.add([request(tmp_path, "third", "--noisy")])
    wait_for_states(worker, FINISHED, FINISHED, FINISHED)
    assert worker.session.process.pid == number
    assert worker.loaded == "fake"


def test_a_render_job_that_could_not_be_read_again_is_refused(worker: RenderWorker, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="a request of 3,000,.* bytes: 2,097,152 are the most"):
        worker.add([request(tmp_path), request(tmp_path, "x" * 3_000_000)])
    assert worker.list_all() == []


def test_another_model_takes_the_place_of_the_loaded_one(worker: RenderWorker, tmp_path: Path) -> None:
    worker.add([request(tmp_path, "first")])
    wait_for_states(worker, FINISHED)
    assert worker.session is not None
    process = worker.session.process
    worker.add([request(tmp_path, "second", "--noisy")])
    wait_for_states(worker, FINISHED, FINISHED)
    assert process.poll() == 0
    assert worker.session.process.pid != process.pid


def test_a_render_job_tells_its_steps_and_shows_a_preview_that_goes_with_it(
    worker: RenderWorker, tmp_path: Path
) -> None:
    worker.add([request(tmp_path, "slow")])
    wait_for(lambda: worker.list_all()[0].done > 3)
    making = worker.list_all()[0]
    assert (making.state, making.doing, making.steps) == (RUNNING, "making it", 3)
    assert worker.preview is not None
    assert worker.preview.read_bytes() == b"a preview"
    # another server sees it too
    wait_for(lambda: RenderQueue(worker.folder).list_all()[0].done > 3)
    worker.cancel(1)
    wait_for_states(worker, STOPPED)
    wait_for(lambda: worker.preview is None)
    wait_for(lambda: not (worker.folder / "preview" / "latent_preview.png").exists())


@pytest.mark.skipif(os.name == "nt", reason="there the process is killed")
def test_a_cancelled_render_job_leaves_the_model_loaded_and_can_be_made_again(
    worker: RenderWorker, tmp_path: Path
) -> None:
    worker.add([request(tmp_path, "slow")])
    wait_for(lambda: worker.list_all()[0].done > 3)
    assert worker.session is not None
    process = worker.session.process
    worker.cancel(1)
    wait_for_states(worker, STOPPED)
    assert process.poll() is None
    with pytest.raises(OptionError, match="no result 1 that is waiting"):
        worker.cancel(1)
    worker.add([request(tmp_path, "quick")])
    wait_for_states(worker, STOPPED, FINISHED)
    worker.again(1)
    wait_for(lambda: worker.list_all()[0].done > 3)
    assert worker.session.process.pid == process.pid
    worker.cancel(1)
    wait_for_states(worker, STOPPED, FINISHED)


def test_a_render_job_that_heeds_no_interrupt_ends_with_its_process_the_second_time(
    worker: RenderWorker, tmp_path: Path
) -> None:
    worker.add([request(tmp_path, "stubborn"), request(tmp_path, "next")])
    wait_for(lambda: worker.list_all()[0].done > 3)
    worker.cancel(1)
    wait_for(lambda: "press again" in worker.list_all()[0].doing)
    assert states(worker) == [RUNNING, WAITING]
    worker.cancel(1)
    wait_for_states(worker, STOPPED, FINISHED)


def test_a_render_job_is_cancelled_while_its_model_is_loaded(worker: RenderWorker, tmp_path: Path) -> None:
    worker.add([request(tmp_path, "a cat", "--dull"), request(tmp_path, "next")])
    wait_for(lambda: worker.session is not None)
    assert worker.list_all()[0].doing == LOADING
    assert worker.loaded == ""
    worker.cancel(1)
    wait_for_states(worker, STOPPED, FINISHED)


def test_a_waiting_render_job_is_taken_back(worker: RenderWorker, tmp_path: Path) -> None:
    worker.add([request(tmp_path, "slow"), request(tmp_path, "never")])
    wait_for(lambda: worker.list_all()[0].done > 3)
    worker.cancel(2)
    worker.cancel(1)
    wait_for_states(worker, STOPPED, STOPPED)
    worker.remove(2)
    assert [making.id for making in worker.list_all()] == [1]
    with pytest.raises(OptionError, match="no finished result 2"):
        worker.remove(2)


@pytest.mark.parametrize(
    ("prompt", "words", "reason"),
    [
        ("fail", (), "OptionError: there is no such thing"),
        ("die", (), "it has burst"),
        ("a cat", ("--wrong",), "models/x.safetensors does not fit --task t2v-14B"),
        ("forget", (), "the process has ended without an error message"),
    ],
)
def test_a_render_job_that_fails_says_why_and_the_next_is_made(
    worker: RenderWorker, tmp_path: Path, prompt: str, words: Sequence[str], reason: str
) -> None:
    worker.add([request(tmp_path, prompt, *words), request(tmp_path, "next")])
    died, _ = wait_for_states(worker, DIED, FINISHED)
    assert died.reason == reason


@pytest.mark.skipif(os.name == "nt", reason="it has no such signal")
def test_a_killed_process_is_called_so_and_its_render_job_can_be_made_again(
    worker: RenderWorker, tmp_path: Path
) -> None:
    worker.add([request(tmp_path, "slow")])
    wait_for(lambda: worker.list_all()[0].done > 3)
    assert worker.session is not None
    os.kill(worker.session.process.pid, signal.SIGKILL)
    (died,) = wait_for_states(worker, DIED)
    assert died.reason.startswith("the process was killed. Often the machine had too little memory")
    worker.again(1)
    wait_for(lambda: worker.list_all()[0].done > 3)
    worker.cancel(1)
    wait_for_states(worker, STOPPED)


def test_the_model_is_freed_when_it_is_idle_and_on_demand(worker: RenderWorker, tmp_path: Path) -> None:
    worker.idle_seconds = 0.2
    worker.add([request(tmp_path)])
    wait_for_states(worker, FINISHED)
    wait_for(lambda: worker.session is None)
    worker.idle_seconds = 600
    worker.add([request(tmp_path, "slow")])
    wait_for(lambda: worker.list_all()[1].done > 3)
    with pytest.raises(OptionError, match="result 2 is being generated"):
        worker.free()
    worker.cancel(2)
    wait_for_states(worker, FINISHED, STOPPED)
    worker.free()
    assert worker.loaded == ""


def test_a_model_is_freed_while_the_result_before_is_still_tidied_up(
    worker: RenderWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_tidying, may_go_on = threading.Event(), threading.Event()

    def tidy_slowly() -> None:
        is_tidying.set()
        may_go_on.wait(PATIENCE)

    monkeypatch.setattr(worker, "_remove_previews", tidy_slowly)
    worker.add([request(tmp_path)])
    wait_for_states(worker, FINISHED)
    assert is_tidying.wait(PATIENCE)
    threading.Timer(0.2, may_go_on.set).start()
    worker.free()
    assert worker.loaded == ""


def test_while_a_process_ends_slowly_the_page_answers(worker: RenderWorker, tmp_path: Path) -> None:
    worker.add([request(tmp_path, "a cat", "--lingering")])
    wait_for_states(worker, FINISHED)
    ending = threading.Thread(target=worker.free)
    ending.start()
    wait_for(lambda: worker.session is None)

    worker.add([request(tmp_path, "next")])
    worker.cancel(2)
    assert (worker.loaded, ending.is_alive()) == ("", True)  # it waits for this file:
    (tmp_path / "end").touch()
    ending.join()


def test_a_job_of_the_queue_waits_for_the_render_job_and_then_has_the_card(
    queue: JobQueue,
    worker: RenderWorker,
    tmp_path: Path,
    lasting: list[str],  # noqa: F811
) -> None:
    worker.add([request(tmp_path, "slow"), request(tmp_path, "next")])
    wait_for(lambda: worker.list_all()[0].done > 3)
    job = queue.add(lasting, tmp_path)
    queue.begin_work()
    try:
        reason = "the page Generate is generating result 1: the job begins after it, or cancel it there"
        wait_for(lambda: queue.problem == reason, lambda: queue.problem)
        assert [each.state for each in queue.jobs()] == [WAITING]
        worker.cancel(1)
        wait_for(lambda: [each.state for each in queue.jobs()] == [RUNNING])
        assert worker.session is None
        wait_for(lambda: worker.waits_for == f"job {job} of the queue runs", lambda: worker.waits_for)
        assert states(worker) == [STOPPED, WAITING]
        queue.stop(job)
        wait_for_states(worker, STOPPED, FINISHED)
    finally:
        queue.end_work()


def test_a_job_that_waits_in_a_paused_queue_holds_nothing_up(
    queue: JobQueue, worker: RenderWorker, tmp_path: Path
) -> None:
    queue.add(["python", "tools/download.py", "--list"], tmp_path)
    worker.add([request(tmp_path)])
    wait_for_states(worker, FINISHED)


def test_render_jobs_outlive_their_server_and_what_it_made_has_died(queue: JobQueue, tmp_path: Path) -> None:
    store = RenderQueue(queue.folder / "making")
    store.add([request(tmp_path, "made"), request(tmp_path, "waits")])
    child = psutil.Popen([sys.executable, "-c", ""])
    child.wait()
    ended = {"machine": identify_machine(), "number": child.pid, "born": 1}
    store.change(1, [WAITING], state=RUNNING, process=ended)
    worker = RenderWorker(queue, start_fake)
    try:
        lost, _ = wait_for_states(worker, DIED, FINISHED)
        assert lost.reason == ENDED_MEANWHILE
        worker.again(1)
        wait_for_states(worker, FINISHED, FINISHED)
    finally:
        worker.close()


@pytest.mark.skipif(os.name == "nt", reason="it has no such signal")
def test_a_process_that_a_killed_server_has_left_is_ended(queue: JobQueue, tmp_path: Path) -> None:
    """It would share the card with the next one."""
    left = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        row = {
            "server": {"machine": identify_machine(), "number": left.pid, "born": 1},
            "process": {"machine": identify_machine(), "number": left.pid, "born": round(left.create_time())},
        }
        folder = queue.folder / "making"
        folder.mkdir(parents=True)
        (folder / "session.json").write_text(json.dumps(row))
        RenderWorker(queue, start_fake).close()
        assert left.wait(PATIENCE) == -signal.SIGKILL
        assert not (folder / "session.json").exists()
    finally:
        if left.is_running():
            left.kill()


def test_of_two_servers_one_makes_the_render_jobs_of_both(
    queue: JobQueue, worker: RenderWorker, tmp_path: Path
) -> None:
    other = RenderWorker(JobQueue(queue.folder), start_fake)
    try:
        worker.add([request(tmp_path, "slow")])
        wait_for(lambda: worker.list_all()[0].done > 3)
        assert other.add([request(tmp_path, "of the other")]) == [2]
        wait_for(lambda: "another server" in other.problem, lambda: other.problem)
        assert states(other) == [RUNNING, WAITING]
        assert other.free_gpu()
        other.cancel(1)  # the server that makes it stops it
        wait_for_states(other, STOPPED, FINISHED)
        assert other.session is None
        assert worker.list_all()[1].file == other.list_all()[1].file
    finally:
        other.close()


def test_ending_the_server_ends_the_process_and_keeps_the_render_jobs(
    queue: JobQueue, tmp_path: Path
) -> None:
    worker = RenderWorker(queue, start_fake)
    worker.add([request(tmp_path, "slow"), request(tmp_path, "waits")])
    wait_for(lambda: worker.list_all()[0].done > 3)
    assert worker.session is not None
    process = worker.session.process
    worker.close()
    assert process.poll() is not None
    stored = RenderQueue(queue.folder / "making").list_all()
    assert [making.state for making in stored] == [STOPPED, WAITING]


def test_a_read_only_server_makes_nothing(queue: JobQueue, tmp_path: Path) -> None:
    RenderQueue(queue.folder / "making").add([request(tmp_path)])
    worker = RenderWorker(JobQueue(queue.folder, read_only=True), start_fake)
    with pytest.raises(OutputError, match="--read_only"):
        worker.add([request(tmp_path)])
    time.sleep(0.5)
    assert states(worker) == [WAITING]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff", b'{"id": 1, "state": "running"}', b"[" * 9999, b'{"id": "1"}']
)
def test_a_damaged_render_job_is_left_out(
    queue: JobQueue, worker: RenderWorker, tmp_path: Path, content: bytes
) -> None:
    worker.add([request(tmp_path)])
    wait_for_states(worker, FINISHED)
    (worker.folder / "2.json").write_bytes(content)
    assert states(worker) == [FINISHED]
    assert worker.add([request(tmp_path)])[0] >= 2


def test_too_many_render_jobs_are_refused(worker: RenderWorker, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="at most 200 are accepted"):
        worker.add([request(tmp_path)] * 201)
    assert states(worker) == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything may be written there")
def test_a_folder_that_cannot_be_written_is_named(
    queue: JobQueue, worker: RenderWorker, tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            worker.add([request(tmp_path)])
    finally:
        tmp_path.chmod(0o700)


# --- results equal those of the command that the page shows


def write_lora(path: Path, dit: Path, module: str, seed: int) -> str:
    """Write a LoRA of rank 2 for one layer of a transformer."""
    rows, columns = load_file(dit)[f"{module}.weight"].shape
    generator = torch.Generator().manual_seed(seed)
    name = f"lora_unet_{module.replace('.', '_')}"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, columns, generator=generator) * 0.3,
        f"{name}.lora_up.weight": torch.randn(rows, 2, generator=generator) * 0.3,
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, path)
    return str(path)


def recipe_of(words: Sequence[str], family: str, folder: Path) -> ModelRecipe:
    fixed: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            fixed[word] = []
        else:
            fixed[[*fixed][-1]].append(word)
    return ModelRecipe(title="tiny", family=family, fixed_options=fixed, initial_texts={}, folder=folder)


def pocket_requests(folder: Path) -> list[RenderRequest]:
    """A LoRA with two strengths, a negative text, another prompt in between."""
    words = ["--task", "t2v-1.3B", "--flow_shift", "3", "--dit_dtype", "float32", "--output_type", "both"]
    for name in ("dit", "vae", "t5"):
        words += [f"--{name}", str(POCKET / f"{name}.safetensors")]
    lora = write_lora(folder / "one.safetensors", POCKET / "dit.safetensors", "blocks.0.self_attn.q", 1)
    second = write_lora(folder / "two.safetensors", POCKET / "dit.safetensors", "blocks.1.ffn.0", 2)
    texts = {"width": "64", "height": "64", "frames": "5", "steps": "3", "guidance": "3", "negative": "blue"}
    first = RenderRequest(
        recipe=recipe_of(words, "wan", folder),
        prompt='a red square ü --x "quoted"\nmoves right',
        texts=texts,
        loras=[UsedLora(lora, "0.8"), UsedLora(second, "1")],
        save_path=str(folder / "session"),
    )
    other = replace(
        first, prompt="-a circle", texts={**texts, "guidance": "1", "negative": "", "width": "96"}
    )
    stronger = replace(first, loras=[UsedLora(lora, "-0.5"), UsedLora(second, "1")])
    return [first, other, stronger, first]


def two_expert_requests(folder: Path) -> list[RenderRequest]:
    files = write_tiny_wan(folder / "models", experts=2)
    assert files.dit_high_noise is not None
    words = ["--task", "t2v-A14B", "--output_type", "both", "--device", "cpu", *files.models]
    low = write_lora(folder / "low.safetensors", files.dit, "blocks.0.self_attn.q", 1)
    high = write_lora(folder / "high.safetensors", files.dit_high_noise, "blocks.0.ffn.0", 2)
    texts = {"width": "48", "height": "32", "frames": "5", "steps": "4", "guidance": "2", "high_cfg": "3"}
    request = RenderRequest(
        recipe=recipe_of(words, "wan", folder),
        prompt="a cat",
        texts=texts,
        loras=[UsedLora(low, "0.5"), UsedLora(high, "1.5", HIGH_NOISE)],
        save_path=str(folder / "session"),
    )
    return [
        request,
        replace(request, loras=[UsedLora(low, "0.5"), UsedLora(high, "0.2", HIGH_NOISE)]),
        request,
    ]


def flux_requests(folder: Path) -> list[RenderRequest]:
    """Pictures, with guidance that is fed into the model and a negative text that needs the other kind."""
    files = write_tiny_flux(folder / "models")
    words = ["--device", "cpu", "--output_type", "latent_images", *files.models]
    lora = write_lora(folder / "one.safetensors", files.dit, "double_blocks.0.img_attn.proj", 1)
    texts = {"width": "64", "height": "48", "steps": "2", "guidance": "2.5", "cfg": "3", "negative": "grey"}
    request = RenderRequest(
        recipe=recipe_of(words, "flux", folder),
        prompt="a cat",
        texts=texts,
        loras=[UsedLora(lora, "0.7")],
        save_path=str(folder / "session"),
    )
    return [request, replace(request, prompt="a dog", texts={**texts, "cfg": "", "negative": ""}), request]


def read_made(folder: Path) -> tuple[dict[str, torch.Tensor], list[bytes], dict[str, str]]:
    """Return the latents, the frames and the texts of the only result in a folder, without times."""
    (latents,) = folder.glob("*_latent.safetensors")
    images = [*folder.rglob("*.png"), *folder.glob("*.mp4")]
    frames = [frame.tobytes() for path in sorted(images) for frame in read_frames(path)]
    tags = read_tags(images[0])
    changing = {"bt_creation_timestamp", "creation_time"}
    return load_file(latents), frames, {name: text for name, text in tags.items() if name not in changing}


def read_frames(path: Path) -> list[object]:
    if path.suffix == ".mp4":
        return list(video_frames(path))
    from PIL import Image

    return [Image.open(path)]


@pytest.mark.slow
@pytest.mark.parametrize("make_requests", [pocket_requests, two_expert_requests, flux_requests])
def test_results_equal_those_of_the_command_line_to_the_bit(
    queue: JobQueue, tmp_path: Path, make_requests: Callable[[Path], list[RenderRequest]]
) -> None:
    """Also after another prompt, and with other strengths, in the same session."""
    worker = RenderWorker(queue)
    try:
        for place, each in enumerate(make_requests(tmp_path)):
            each.check()
            folder = Path(each.save_path)
            making = each.as_render_job("7")
            worker.add([making])
            wait_for_states(worker, *[FINISHED] * (place + 1))
            of_session = read_made(folder)
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            typed = shlex.split(shlex.join(making.command))
            alone = tmp_path / f"alone {place}"
            typed[typed.index("--save_path") + 1] = str(alone)
            run_python(ROOT / typed[1], *typed[2:], folder=tmp_path, environment=QUIET)
            latents, frames, tags = read_made(alone)
            assert of_session[0].keys() == latents.keys()
            assert all(torch.equal(of_session[0][name], latents[name]) for name in latents)
            assert frames
            assert of_session[1] == frames
            assert of_session[2] == tags
    finally:
        worker.close()
