"""Pairs and triples of features, in all families: they work together, or the error names both before a load.

The default suite runs a seeded sample, the slow one all pairs.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from modules.errors import OptionError
from modules.media.writing import write_video
from tests.generation.guided import SAY, STEPS, Script, is_finite, write_scripts
from tests.tiny.project import moving_square

TEXT = ("--prompt", "a (cat:1.5) with __colour__ eyes", *SAY[2:])


@dataclass(frozen=True)
class Feature:
    """Options as typed, with {folder} for the folder of inputs; of some families alone."""

    words: str
    families: str = "wan hunyuan skyreels framepack"  # the kinds whose names begin with one of these


FEATURES = {
    "schedule": Feature("--cfg_schedule 1-2:4"),
    "skip mode": Feature("--cfg_skip_mode early --cfg_apply_ratio 0.5"),
    "slg original": Feature("--slg_mode original --slg_layers 1 --slg_end 1"),
    "slg uncond": Feature("--slg_mode uncond --slg_layers 1 --slg_end 1"),
    "zero scaling": Feature("--cfgzerostar_scaling"),
    "zero init": Feature("--cfgzerostar_init_steps 1"),
    "perp neg": Feature("--perp_neg 1.5"),
    "rescale": Feature("--guidance_rescale 0.5"),
    "nag": Feature("--nag_scale 4"),
    "no embedded": Feature("--disable_embedded_for_cfg", "hunyuan skyreels"),
    "riflex": Feature("--riflex_index 1 --rope_func comfy", "wan"),
    "slow riflex": Feature("--riflex_index 1", "hunyuan skyreels"),
    "lower precision": Feature("--lower_precision_attention", "wan"),
    "magcache": Feature("--magcache_mag_ratios 1 0.98 0.97 0.9 --magcache_threshold 0.5"),
    "preview": Feature("--preview_latent_every 1"),
    "weights": Feature("--prompt_weighting"),
    "wildcards": Feature("--prompt_wildcards {folder}"),
    "alternatives": Feature("--prompt_alternatives"),
    "lcm": Feature("--sample_solver lcm"),
    "sde": Feature("--sample_solver dpm++sde"),
    "wan v2v": Feature("--video_path {folder}/clip.mp4 --v2v_denoise 0.5 --v2v_extra_noise 0.1", "wan"),
    "hunyuan v2v": Feature("--video_path {folder}/clip.mp4 --strength 0.5", "hunyuan skyreels"),
    "sheet": Feature("--sheet seed=1,2 --output_type both"),
    "swap": Feature("--blocks_to_swap 1", "wan"),  # the others have too few blocks
    "fp8": Feature("--fp8_scaled --upcast_linear"),
    "compile": Feature("--compile --compile_args eager default auto False"),
    "latents": Feature("--num_videos 2"),
    "video": Feature("--video_path {folder}/clip.mp4 --strength 0.7 --v2v_extra_noise 0.02"),
}
# what excludes each other
REFUSED = {
    frozenset({"zero scaling", "perp neg"}),
    frozenset({"slg original", "perp neg"}),
    frozenset({"schedule", "skip mode"}),
    frozenset({"latents", "sheet"}),
}
KINDS = ("wan", "wan i2v", "hunyuan", "skyreels i2v", "framepack", "wan A14B")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs that features need."""
    made = tmp_path_factory.mktemp("inputs")
    (made / "colour.txt").write_text("green\nblue: 2\n", encoding="utf-8")
    write_video(made / "clip.mp4", moving_square(9, 32, 32, seed=0), 16)
    return made


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Script]:
    return write_scripts(tmp_path_factory.mktemp("models"))


def features_of(kind: str) -> list[str]:
    return [
        name
        for name, feature in FEATURES.items()
        if any(kind.startswith(family) for family in feature.families.split())
    ]


def is_one_option(names: Iterable[str]) -> bool:
    """Whether two of the features are values of the same option."""
    options = [FEATURES[name].words.partition(" ")[0] for name in names]
    return len(set(options)) < len(options)


def all_pairs() -> list[tuple[str, tuple[str, ...]]]:
    pairs = [(kind, pair) for kind in KINDS for pair in itertools.combinations(features_of(kind), 2)]
    return [(kind, pair) for kind, pair in pairs if not is_one_option(pair)]


def sample() -> list[tuple[str, tuple[str, ...]]]:
    """A few pairs and triples of each kind, the same in every run; and all that are refused."""
    draw = random.Random(14)
    chosen: list[tuple[str, tuple[str, ...]]] = [
        (kind, tuple(sorted(pair))) for kind, pair in zip(KINDS, sorted(REFUSED, key=sorted), strict=False)
    ]
    for kind in KINDS:
        names = features_of(kind)
        chosen += [(kind, tuple(draw.sample(names, size))) for size in (2, 2, 2, 3, 3)]
    return [(kind, names) for kind, names in chosen if not is_one_option(names)]


def check(scripts: dict[str, Script], kind: str, names: Sequence[str], folder: Path, target: Path) -> None:
    words = [word.format(folder=folder) for name in names for word in FEATURES[name].words.split()]
    if any(set(pair) in REFUSED for pair in itertools.combinations(names, 2)):
        with pytest.raises(OptionError):
            scripts[kind].run(target, *words, say=TEXT)
        return
    made, calls = scripts[kind].run(target, *words, say=TEXT)
    assert len(made) == (2 if {"latents", "sheet"} & {*names} else 1)
    assert is_finite(made)
    assert {call.step for call in calls} <= set(range(STEPS))


def cases(found: Iterable[tuple[str, tuple[str, ...]]]) -> list[object]:
    return [pytest.param(kind, names, id=f"{kind}: {', '.join(names)}") for kind, names in found]


@pytest.mark.parametrize(("kind", "names"), cases(sample()))
def test_features_work_together(
    kind: str, names: tuple[str, ...], scripts: dict[str, Script], folder: Path, tmp_path: Path
) -> None:
    check(scripts, kind, names, folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "names"), cases(all_pairs()))
def test_all_pairs_work_together(
    kind: str, names: tuple[str, ...], scripts: dict[str, Script], folder: Path, tmp_path: Path
) -> None:
    check(scripts, kind, names, folder, tmp_path)
