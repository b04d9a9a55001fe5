"""Measure what previews cost.

    python benchmarks/previews.py

First the steps of the pocket model, with a preview of every step and without, in turns: the figure is the
median ratio of neighbors, including the wait for the last preview. On a CPU it counts the processor time of
all threads. Then a preview of a clip of common size: the time that it takes in the loop, which steps wait
for, and the time of the thread that writes.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

AIM = 1.03
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Print the ratio with previews to without, and the cost of a large preview."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="clips of each kind")
    parser.add_argument("--steps", type=int, default=20, help="steps of a clip")
    parser.add_argument("--size", type=int, nargs=3, default=(81, 480, 832), help="frames, height, width")
    parser.add_argument("--preview_vae", type=Path, help="measure a TAEHV of 16 channels too")
    parser.add_argument("--device", help="as of the scripts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain, shown = _pocket_clips(Path(folder), args)
        large = _large_clip(Path(folder), args)
    ratio = statistics.median(
        with_previews / alone for with_previews, alone in zip(shown, plain, strict=True)
    )
    print(
        f"{args.steps} steps of the pocket model: {statistics.median(plain):.3f} s, with a preview of each "
        f"{statistics.median(shown):.3f} s"
    )
    for name, (loop, thread) in large.items():
        print(
            f"a preview of {'x'.join(map(str, args.size))} {name}: {1e3 * loop:.1f} ms in the loop, which is "
            f"3 % of a step of {loop / 0.03:.2f} s; {thread:.2f} s in the thread"
        )
    print(f"ratio {ratio:.3f}, aim at most {AIM} (of the fastest clips {min(shown) / min(plain):.3f})")
    raise SystemExit(ratio > AIM)


def _pocket_clips(folder: Path, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Return seconds of clips without previews and with them."""
    import wan_generate_video
    from blissful_tuner.latent_preview import preview_clip
    from generation.denoise import make_latents
    from generation.experts import ExpertOffloader
    from generation.loaded_networks import Session, select_prompts
    from generation.making import encode_all_inputs
    from generation.network_setup import dit_loader
    from generation.options import read_generation
    from generation.request import GenerationRun, make_job
    from modules.devices import Failures, select_device
    from wan.family import family_for_generation
    from wan.options import WanGenerationOptions

    words = ["--prompt", "a red circle moving left", "--seed", "1", "--save_path", str(folder)]
    words += ["--task", "t2v-1.3B", "--dit", str(ROOT / "pocket/dit.safetensors")]
    words += ["--vae", str(ROOT / "pocket/vae.safetensors"), "--t5", str(ROOT / "pocket/t5.safetensors")]
    words += ["--video_size", "64", "64", "--video_length", "17", "--infer_steps", str(args.steps)]
    words += ["--guidance_scale", "3", "--flow_shift", "3", "--preview_latent_every", "1"]
    options, own = read_generation(None, wan_generate_video.DEFAULTS, WanGenerationOptions, words)
    device, family = select_device(args.device), family_for_generation(own)
    session = Session(
        family, device, ExpertOffloader(family.experts, device, dit_loader(family, (), device, options))
    )
    run = GenerationRun(family, options, session).with_previews()
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    job = make_job(run, "the prompt", {})
    (texts,) = session.encode_texts([select_prompts(job.prepared, options.guidance)])
    inputs = encode_all_inputs(run, [job], Failures())[job.label]

    def make(previews: Any) -> float:
        start = clock()
        with preview_clip(previews, job.prepared.fps) as (watchers, on_section):
            make_latents(
                *(family, dit_at, job.prepared, texts, inputs, device),
                guidance_options=options.guidance,
                watchers=watchers,
                on_section=on_section,
            ).cpu()
        return clock() - start

    plain: list[float] = []
    shown: list[float] = []
    with session.dits.phase() as dit_at:
        for _ in range(2):  # warm up
            make(None)
            make(run.previews)
        for _ in range(args.rounds):
            plain.append(make(None))
            shown.append(make(run.previews))
    return plain, shown


def _large_clip(folder: Path, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return the seconds of a preview in the loop and in the thread."""
    import torch

    from blissful_tuner.latent_preview import make_previews
    from blissful_tuner.options import PreviewOptions
    from modules.devices import select_device
    from wan.spec import LATENT

    device = select_device(args.device)
    latents = torch.randn(LATENT.shape(*args.size), device=device)
    found = {}
    kinds = {"as colors": None} | ({} if args.preview_vae is None else {"by TAEHV": args.preview_vae})
    for name, path in kinds.items():
        previews = make_previews(
            PreviewOptions(preview_latent_every=1, preview_vae=path), LATENT, folder, device, lambda _: True
        )
        assert previews is not None
        loop, thread = [], []
        for _ in range(4):
            seconds, shot = _seconds(partial(previews.take, latents, 16.0), device)
            loop.append(seconds)
            thread.append(_seconds(partial(previews.write, lambda shot=shot: shot), device)[0])
        found[name] = statistics.median(loop[1:]), statistics.median(thread[1:])
    return found


def _seconds(work: Callable[[], Any], device: Any) -> tuple[float, Any]:
    """Return the seconds of `work`, and what it returned."""
    import torch

    start = time.perf_counter()
    made = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, made


if __name__ == "__main__":
    main()
