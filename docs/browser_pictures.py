"""Make docs/browser_*.png, the pages for all runs in two sizes, light and dark.

    python docs/browser_pictures.py

Its runs and samples are drawn. It is photographed in a headless Chromium, as tests/chromium.py finds it.
"""

import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from browser.jobs.jobs import QUEUE, STATE, JobQueue  # noqa: E402
from browser.jobs.model_files import list_tasks  # noqa: E402
from modules.atomic_write import write_text  # noqa: E402
from modules.media.reading import Frame  # noqa: E402
from modules.media.writing import write_video  # noqa: E402
from modules.parser import Parser  # noqa: E402
from pocket import drawing  # noqa: E402
from tests.browser.serving import Served, serve_runs  # noqa: E402
from tests.chromium import open_page, wait_until  # noqa: E402
from tests.commands import run_script  # noqa: E402
from training.reports.history import HIGHEST, PREDICTED, History, describe_process, history_path  # noqa: E402

RUNS = (  # name, family, seed, step, total steps, how it ended
    ("blorp", "wan", 3, 1240, 2000, None),
    ("white_and_green", "wan", 5, 1600, 1600, ("finished", "good")),
    ("green_and_white", "hunyuan_video", 8, 900, 900, ("finished", "good")),
    ("yellow_blorp", "flux_2", 13, 700, 1200, ("stopped after step 700", "")),
    ("fast_blorp", "wan", 21, 310, 1600, ("ended by an error after step 310: the loss is nan", "bad")),
)
PROMPTS = (  # what the clips of `draw_clip` show, by the index of their seed
    "a red blorp moving right",
    "a yellow blorp moving down",
    "a white blorp moving left and a green blorp moving up",
)
SHOWN = {  # widths and schemes of each page
    "list": ((1440, "light"), (360, "dark")),
    "run": ((1440, "dark"), (360, "light")),
    "compare": ((1440, "light"),),
    "queue": ((1440, "light"), (360, "dark")),
    "dataset": ((1440, "light"), (360, "dark")),
    "new": ((1440, "light"), (360, "light")),
    "generate": ((1440, "dark"),),
    "models": ((1440, "light"),),
}
HOME = "/home/me"  # what the pictures show in place of a temporary folder
LOADED = (("wan", "t2v-1.3B"), ("z_image", "turbo"))  # tasks whose files are there, without content
# number, script with its options, exit code; -1: it runs, None: it waits
JOBS = (
    (1, "wan_cache_latents.py --dataset_config blorp.toml --vae models/wan_2.1_vae.safetensors", 0),
    (2, "wan_cache_latents.py --dataset_config stars.toml --vae models/wan_2.1_vae.safetensors", 1),
    (3, "wan_train_network.py --config_file blorp.toml --output_name blorp", -1),
    (4, "wan_train_network.py --config_file stars.toml --output_name fast_blorp --resume latest", None),
    (5, "wan_generate_video.py --from_file prompts.txt --lora_weight output/blorp.safetensors", None),
)
COMPARED = (300, 900, 1200)  # steps
GENERATE = (
    "python {root}/wan_generate_video.py --task t2v-1.3B --dit {models}/wan2.1_t2v_1.3B_bf16.safetensors"
    " --vae {models}/Wan2.1_VAE.pth --t5 {models}/models_t5_umt5-xxl-enc-bf16.pth --video_length 33"
    " --video_size 480 832 --infer_steps 30 --guidance_scale 5.0 --flow_shift 3.0 --seed 1"
    " --lora_weight {lora} --prompt 'a red blorp moving right' --save_path {folder}/generated"
)
RESULTS = (  # seed, prompt
    (31, "a yellow blorp moving down"),
    (32, "two blorps at night"),
    (33, "a red blorp moving right"),
    (34, "a yellow blorp moving down, slowly"),
    (35, "a white and a green blorp"),
    (36, "a large red blorp moving right"),
)
TALL = {"compare": 1500, "new": 1300}  # heights of wide windows
SAID = {
    2: "DatasetError: stars.toml cannot be read: No such file or directory. Pass the file's path to "
    "--dataset_config.",
    3: "steps:  62%|######2   | 1240/2000 [1:04:26<39:30,  3.12s/it, avr_loss=0.0957]",
}
CAPTIONS = (  # and frames, of the clips of the dataset
    ("a white and a green blorp on purple", 17),
    ("a red blorp moving right", 17),
    ("a yellow blorp moving down, in the evening", 17),
    ("two blorps at night", 9),
)
# shapes of a clip as the pocket model knows them: color, form and direction of each, and the ground
SCENES = (
    ((("red", "diamond", "right"),), "navy"),
    ((("yellow", "diamond", "down"),), "brown"),
    ((("white", "diamond", "left"), ("green", "diamond", "up")), "purple"),
)
DATASET = """[general]
resolution = [192, 112]
caption_extension = ".txt"

[[datasets]]
video_directory = "{0}/clips"
cache_directory = "{0}/cache"
target_frames = [17]
"""
# a page that asks again would answer for the renamed folder, which is not there
FREEZE = "() => { fetch = () => new Promise(() => {}); XMLHttpRequest.prototype.send = () => {}; }"
# replaces the temporary folder in texts and fields
RENAME = """([folder, home]) => {
  const marks = document.createTreeWalker(document.body, NodeFilter.SHOW_COMMENT);
  const comments = [];
  while (marks.nextNode()) comments.push(marks.currentNode);
  comments.forEach(comment => comment.remove()); // they cut a path in two texts
  document.body.normalize();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replaceAll(folder, home);
  for (const field of document.querySelectorAll('input, textarea')) {
    field.value = field.value.replaceAll(folder, home);
    field.placeholder = field.placeholder?.replaceAll(folder, home) ?? '';
  }
}"""
# on a phone, the clips of a run stand below its buttons
MOVES = "(seen.size || innerWidth < 1000) && [...seen].every(clip => clip.currentTime > 0)"
READY = {
    "queue": "true",
    "new": "true",
    "models": "true",
    "generate": "true",
    "dataset": "$('state').textContent.startsWith('o') && document.querySelectorAll('.view img').length > 3"
    " && [...document.querySelectorAll('.view img')].slice(0, 2).every(one => one.naturalWidth)",
}
COLOURS = 200


def main() -> None:
    """Write example runs, serve the page over them, and save a screenshot of each page that is asked for."""
    parser = Parser(description=__doc__)
    parser.add_argument("pages", nargs="*", help="only these; all if none is named")
    chosen = parser.parse_args().pages or list(SHOWN)
    with tempfile.TemporaryDirectory() as name:
        films = Path(name) / "films"
        for run in reversed(RUNS):  # the newest is the first
            write_run(films / run[0], *run)
        write_dataset(films / RUNS[0][0])
        write_clips(films / "blorp_clips")
        write_results(films / "generated")
        write_models(Path(name) / "models")
        queue = write_queue(films / "queue")
        with serve_runs(films, queue=queue, models=Path(name) / "models") as served:
            queue.begin_work()
            addresses = find_pages(served)
            for place in chosen:
                address = addresses[place]
                for width, scheme in SHOWN[place]:
                    height = TALL.get(place, 1000) if width > 1000 else 760
                    with open_page(served.url + address, width, height, color_scheme=scheme) as page:
                        wait_until(page, READY.get(place, MOVES))
                        if place == "new":
                            fill_new(page, is_wide=width > 1000)
                        wait_until(page, "document.getElementById('machine').textContent.includes('free')")
                        if place in ("new", "generate", "models"):
                            page.wait_for_timeout(1500)  # for small pictures, if there are any
                        page.evaluate(FREEZE)
                        page.evaluate(RENAME, [name, HOME])
                        page.evaluate(RENAME, [str(ROOT), f"{HOME}/reelsmith"])
                        # few machines without a screen have letters for the names of the other languages
                        page.evaluate("document.querySelector('.languages').remove()")
                        page.screenshot(path=Path(name) / "page.png")
                    shown = Image.open(Path(name) / "page.png").convert("RGB")
                    shown.quantize(COLOURS, dither=Image.Dither.NONE).save(
                        ROOT / "docs" / f"browser_{place}_{width}_{scheme}.png", optimize=True
                    )


def find_pages(served: Served) -> dict[str, str]:
    """Return the address of each page that is photographed."""
    run, listed = served.of(RUNS[0][0]), served.ask("/datasets").text
    files = [f"{run.split('/')[2]}/{saved_name(RUNS[0][0], step)}" for step in COMPARED]
    asked = urlencode({"file": files, "prompt": PROMPTS[:2], "more": "a blue star --d 7"}, doseq=True)
    dataset = re.findall(rf'(/dataset/\w+/)"><b>[\w.]+ in {RUNS[0][0]}', listed)[0]
    clips = served.runs.root_folders[0] / "blorp_clips"
    form = {"folder": str(clips), "family": "wan", "task": "t2v-1.3B", "trigger": "blorp"}
    form |= {f"file_{part}": str(ROOT / "pocket" / f"{part}.safetensors") for part in ("dit", "vae", "t5")}
    return {
        "list": "/",
        "run": run,
        "compare": f"/compare?{asked}",
        "queue": "/queue",
        "dataset": dataset,
        "new": f"/new?{urlencode({**form, 'steps': '2000'})}",
        "generate": f"/generate?run={run.split('/')[2]}",
        "models": "/models?family=wan&task=t2v-1.3B",
    }


def write_results(folder: Path) -> None:
    """Write clips in place of what the page Generate has made."""
    folder.mkdir()
    for seed, prompt in RESULTS:
        tags = {
            "bt_model_type": "wan",
            "bt_task": "t2v-1.3B",
            "bt_seeds": str(seed),
            "bt_prompt": prompt,
            "bt_infer_steps": "30",
            "bt_guidance_scale": "5.0",
            "bt_width": "832",
            "bt_height": "480",
            "bt_video_length": "33",
            "bt_fps": "16",
            "bt_lora_0": f"{saved_name(RUNS[0][0], COMPARED[-1])}: 1.0",
        }
        clip = iter(draw_clip(seed, 0))
        write_video(folder / f"blorp_{seed}.mp4", clip, 16, crf=20, preset="veryfast", tags=tags)


def write_models(folder: Path) -> None:
    """Write files of the released names and sizes, without content."""
    for files in list_tasks(folder):
        if (files.model.family, files.model.task) not in LOADED:
            continue
        for part in files.parts:
            for file in part.component.files:
                path = folder / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as opened:
                    opened.truncate(file.size_bytes or part.component.tensor_bytes or 1000)


def write_run(
    folder: Path, name: str, model: str, seed: int, step: int, total: int, end: tuple[str, str] | None
) -> None:
    """Write the history and the samples of a run whose pictures become sharper."""
    history, generator = History(history_path(folder, name), 1), np.random.default_rng(seed)
    (folder / "sample").mkdir(parents=True)
    given = [["dataset_config", str(folder / "dataset.toml")]]  # only the first has one
    told = {"model": model, "total_steps": total, "changed": given, "unchanged": [], "listens": True}
    history.add(0, started={**told, "process": describe_process()})
    history.add(0, memory=[[PREDICTED, "14.6 GiB"], [HIGHEST, "13.9 GiB"]])
    for each in range(0, step + 1, 10):
        learned = math.exp(-each / 500)
        if each:
            rates = {"lr/unet": 1e-4 * (1 + math.cos(math.pi * each / total)) / 2}
            loss = 0.09 + 0.08 * learned + float(generator.normal(0, 0.012))
            history.add(each, loss=loss, rates=rates, seconds=3.1 + float(generator.normal(0, 0.05)))
        if each % 50 == 0:
            history.add(each, validation={"validation/loss": 0.1 + 0.07 * learned})
        if each % 300 == 0:
            files = {str(index): f"{name}_{each:06d}_{index:02d}.mp4" for index in range(len(PROMPTS))}
            for index, file in files.items():
                frames = draw_clip(seed + int(index), 24 * learned)
                write_video(folder / "sample" / file, iter(frames), 16, crf=20, preset="veryfast")
            history.add(
                each, samples=f"{each:06d}", files=files, prompts=dict(zip(files, PROMPTS, strict=True))
            )
        if each in (*COMPARED, 600):
            weights = {"x": np.full(1, seed + each, np.float32)}
            save_file(weights, folder / saved_name(name, each), {"ss_base_model_version": model})
            history.add(each, saved=saved_name(name, each))
    command = GENERATE.format(
        root=ROOT,
        models=folder.parent.parent / "models",
        lora=folder / saved_name(name, COMPARED[-1]),
        folder=folder.parent,
    )
    history.add(step, commands=[["Generate with it", command, command, ""]])
    if end:
        history.add(step, ended=end[0], kind=end[1])
    history.flush()


def saved_name(name: str, step: int) -> str:
    """Return the name of the LoRA file that the run `name` saves at `step`."""
    return f"{name}-step{step:08d}.safetensors"


def write_queue(folder: Path) -> JobQueue:
    """Write a queue whose running job is the process that has started this one."""
    (folder / "logs").mkdir(parents=True)
    rows = []
    for number, words, code in JOBS:
        process = None if code is None else describe_process(os.getppid())  # the run is its child
        row = {"id": number, "line": f"python {words}", "folder": str(folder.parent), "process": process}
        rows.append(row)
        (folder / "logs" / f"{number}.log").write_text(SAID.get(number, ""), encoding="utf-8")
        if code in (0, 1):
            (folder / "logs" / f"{number}.code").write_text(str(code), encoding="utf-8")
    write_text(folder / STATE, json.dumps({"last": len(JOBS), "worker": None, "jobs": rows}))
    write_text(folder / QUEUE, "".join(f"{row['line']}\n" for row in rows))
    return JobQueue(folder)


def write_dataset(folder: Path) -> None:
    """Write clips and cache them by the pocket models; then one caption is changed."""
    write_clips(folder / "clips")
    (folder / "dataset.toml").write_text(DATASET.format(folder.as_posix()), encoding="utf-8")
    given = ("--dataset_config", folder / "dataset.toml")
    run_script("wan_cache_latents.py", *given, "--vae", ROOT / "pocket/vae.safetensors")
    run_script("wan_cache_text_encoder_outputs.py", *given, "--t5", ROOT / "pocket/t5.safetensors")
    (folder / "clips/3.txt").write_text("a red blorp moving right, fast", encoding="utf-8")


def write_clips(folder: Path) -> None:
    """Write clips with captions."""
    folder.mkdir()
    for seed, (caption, frames) in enumerate(CAPTIONS, 2):
        write_video(folder / f"{seed}.mp4", iter(draw_clip(seed, 0, frames)), 16, crf=20)
        (folder / f"{seed}.txt").write_text(caption, encoding="utf-8")


def fill_new(page: Any, is_wide: bool) -> None:
    """Describe the folder if it is not; on a phone show what was said of it."""
    described = page.locator("#progress .state", has_text=re.compile("^prepared$"))
    if not described.count():
        page.get_by_role("button", name="Prepare").click()
        described.wait_for(timeout=120_000)
        page.get_by_role("button", name="Start", exact=True).wait_for(timeout=120_000)
    if is_wide:
        page.evaluate("scrollTo(0, 0)")
    else:
        page.locator("#progress h2").first.evaluate("heading => heading.scrollIntoView()")


def draw_clip(seed: int, blur: float, frames: int = 17, width: int = 320, height: int = 240) -> list[Frame]:
    """Shapes of the pocket model that move over a plain ground, out of focus by `blur` pixels."""
    random = np.random.default_rng(seed)
    shapes, ground = SCENES[seed % len(SCENES)]
    things = [
        drawing.draw_thing(random, colour=color, shape=form, direction=direction, width="large")
        for color, form, direction in shapes
    ]
    clip = drawing.draw(drawing.Scene(tuple(things), ground, drawing.GROUNDS[ground]), count=frames)
    drawn = []
    for frame in clip:
        large = cv2.resize(frame, (height, height), interpolation=cv2.INTER_CUBIC)
        side = (width - height) // 2
        wide = cv2.copyMakeBorder(large, 0, 0, side, width - height - side, cv2.BORDER_REPLICATE)
        drawn.append(cv2.GaussianBlur(wide, (0, 0), blur + 0.01))
    return drawn


if __name__ == "__main__":
    main()
