"""The page of benchmarks/evening.py: one HTML file, from checked figures and the pixels of samples alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evening_figures import OWN, EveningFigures, show_cosine, show_gib, show_seconds
from modules.pages.page import embed_image, write_page
from training.reports.sample_files import join_strip, read_downscaled

TEMPLATE = Path(__file__).resolve().with_name("evening.html")
SIDE = 960  # pixels of a strip of frames


@dataclass(frozen=True)
class ShownSample:
    """A sample of drawn data."""

    step: int
    path: Path


def write_evening_page(path: Path, figures: EveningFigures, samples: Sequence[ShownSample]) -> None:
    """Write the page. Samples are encoded again, so that nothing but their pixels is in it."""
    machine, step = figures.machine, figures.step
    losses = ["-" if loss is None else f"{loss:.4f}" for loss in (figures.first_loss, figures.last_loss)]
    shown = [
        (f"step {sample.step}", embed_image(join_strip(read_downscaled(sample.path)), "sample", SIDE))
        for sample in samples
    ]
    memory = [
        ("a training step", figures.training_memory),
        ("generation", figures.generation_memory),
    ]
    values = {
        "figures": figures,
        "machine": machine,
        "gpu": f"{machine.gpu}, {show_gib(machine.gpu_bytes)} GiB" if machine.gpu else "none, the processor",
        "step": [show_seconds(seconds) for seconds in (step.median, step.low, step.high)],
        "phases": [
            (
                phase.name,
                f"{phase.seconds:.1f}",
                str(phase.attempts),
                show_gib(phase.device_bytes),
                show_gib(phase.host_bytes),
            )
            for phase in figures.phases
        ],
        "total": f"{sum(phase.seconds for phase in figures.phases) / 60:.1f}",
        "memory": [
            (
                name,
                show_gib(each.planned),
                show_gib(each.measured),
                "-" if each.difference is None else f"{each.difference:+.1%}",
            )
            for name, each in memory
        ],
        "losses": losses,
        "scores": None
        if figures.scores is None
        else [
            ("CLIP score", show_cosine(figures.scores.clip_before), show_cosine(figures.scores.clip_after)),
            (
                "likeness to the data",
                show_cosine(figures.scores.likeness_before),
                show_cosine(figures.scores.likeness_after),
            ),
        ],
        "samples": shown,
        "is_own": figures.data == OWN,
    }
    write_page(path, TEMPLATE, f"{figures.family} {figures.task} on this card", values)
