"""The rows of the GPU benchmark do their work on tiny models on a CPU; what they take there says nothing."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_files import forget
from benchmarks.gpu_measuring import measure_row
from benchmarks.gpu_rows import BY_NAME, Row, Size
from tests.commands import ROOT, run_program
from tests.tiny import flux, framepack_dit, hunyuan_dit, hunyuan_image, lumina, wan_dit
from tests.tiny.hunyuan_encoders import llama_tensors, prefixed, save
from tests.tiny.hunyuan_vae import write_vae
from tests.tiny.wan_encoders import t5_tensors, vae_tensors

CPU = torch.device("cpu")
CLIP, SECTION, PICTURE = Size(32, 32, 5), Size(32, 32, 37), Size(64, 64)
SWAPPED = (
    *("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload", "--fp8_base", "--fp8_scaled"),
    *("--blocks_to_swap", "1"),
)
Write = Callable[[Path], Path]


def _wan(kind: str) -> Write:
    return lambda folder: wan_dit.write_dit(folder, wan_dit.tiny_state(kind, dtype=torch.bfloat16))


def _flux(kind: str) -> Write:
    return lambda folder: flux.write_dit(folder, flux.tiny_state(kind, dtype=torch.bfloat16))


def _tiny(name: str, size: Size, *options: str) -> Row:
    """A row with a tiny size, and other options if there are any; nothing is compiled."""
    row = BY_NAME[name]
    kept = tuple(word for word in row.options if word != "--compile")
    return replace(row, size=size, options=options or kept, text_tokens=7, steps=2)


TRAINED = {
    "wan14b-bf16": (_wan("t2v"), CLIP, ()),
    "wan14b-fp8-swap38-offload": (_wan("t2v"), CLIP, SWAPPED),
    "wan14b-bf16-keep-compiled": (_wan("t2v"), CLIP, ()),
    "wan22-5b-bf16-compiled": (_wan("ti2v"), CLIP, ()),
    "hunyuan-bf16": (
        lambda folder: hunyuan_dit.write_dit(folder, hunyuan_dit.tiny_state("t2v", dtype=torch.bfloat16)),
        CLIP,
        (),
    ),
    "framepack-bf16": (
        lambda folder: framepack_dit.write_dit(folder, framepack_dit.tiny_state(dtype=torch.bfloat16)),
        SECTION,
        (),
    ),
    "flux-bf16": (_flux("dev"), PICTURE, ()),
    "chroma-bf16-compiled": (_flux("chroma"), PICTURE, ()),
    "hunyuan-image-bf16-compiled": (
        lambda folder: hunyuan_image.write_dit(folder, hunyuan_image.tiny_state(dtype=torch.bfloat16)),
        PICTURE,
        (),
    ),
    "lumina-bf16-compiled": (
        lambda folder: lumina.write_dit(folder, lumina.tiny_state(dtype=torch.bfloat16)),
        PICTURE,
        (),
    ),
}
GENERATED = {
    "gen-wan14b-i2v": (_wan("i2v"), CLIP, ("--fp8_scaled",)),
    "gen-wan22-5b": (_wan("ti2v"), CLIP, ("--attn_mode", "torch")),
    "gen-hunyuan": (TRAINED["hunyuan-bf16"][0], CLIP, ("--split_uncond",)),
    "gen-framepack": (TRAINED["framepack-bf16"][0], SECTION, ()),
    "gen-flux": (TRAINED["flux-bf16"][0], PICTURE, ()),
    "gen-chroma": (TRAINED["chroma-bf16-compiled"][0], PICTURE, ()),
    "gen-hunyuan-image": (TRAINED["hunyuan-image-bf16-compiled"][0], PICTURE, ()),
    "gen-lumina": (TRAINED["lumina-bf16-compiled"][0], PICTURE, ()),
}


# one of each kind by default; a training step is measured without packages, below
USUAL = {"gen-flux", "load-fp8", "cache-wan-vae", "cache-umt5"}


def _slow(names: Iterable[str]) -> list[Any]:
    """The usual rows, and the others marked as slow."""
    return [pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _slow(TRAINED))
def test_a_training_step_is_measured_and_planned(tmp_path: Path, name: str) -> None:
    write, size, options = TRAINED[name]
    path = write(tmp_path)

    found = measure_row(_tiny(name, size, *options), path, None, CPU, enough=0)

    assert found["calls"] == 2
    assert len(found["losses"]) == 3
    assert min(found["losses"]) > 0.1
    assert found["planned"] > path.stat().st_size / 2
    assert found["operations"] > found["model_operations"] > 0


@pytest.mark.parametrize("name", _slow(GENERATED))
def test_a_generation_is_measured_and_planned(tmp_path: Path, name: str) -> None:
    write, size, options = GENERATED[name]
    path = write(tmp_path)

    found = measure_row(_tiny(name, size, *options), path, None, CPU, enough=0)

    assert found["per"] == 2
    assert found["whole"] > 20
    assert found["planned"] > path.stat().st_size / 2
    assert found["operations"] > 0


@pytest.mark.slow
def test_two_experts_take_turns(tmp_path: Path) -> None:
    low, high = (
        wan_dit.write_dit(tmp_path, wan_dit.tiny_state("t2v", seed, dtype=torch.bfloat16), name=f"dit{seed}")
        for seed in range(2)
    )

    found = measure_row(_tiny("gen-wan22-14b", CLIP, "--attn_mode", "torch"), low, high, CPU, enough=0)

    assert found["planned"] > low.stat().st_size + high.stat().st_size


@pytest.mark.parametrize("name", _slow(["cache-wan-vae", "cache-hunyuan-vae"]))
def test_the_encoding_of_clips_is_measured(tmp_path: Path, name: str) -> None:
    path = tmp_path / "vae.safetensors"
    if name == "cache-wan-vae":
        save(path, vae_tensors())
    else:
        write_vae(path)

    found = measure_row(_tiny(name, CLIP, "--vae_dtype", "float32"), path, None, CPU, enough=0)

    assert found["per"] == 2
    assert found["seconds"] > 0


@pytest.mark.parametrize("name", _slow(["cache-umt5", "cache-llama"]))
def test_the_encoding_of_texts_is_measured(tmp_path: Path, name: str) -> None:
    path = tmp_path / "encoder.safetensors"
    save(path, t5_tensors() if name == "cache-umt5" else prefixed(llama_tensors(), "model."))

    found = measure_row(replace(BY_NAME[name], text_tokens=512), path, None, CPU, enough=0, profiled=True)

    assert found["per"] == 8
    assert found["profile"][0].startswith("| group | ms a step |")
    assert found["seconds"] > 0


@pytest.mark.parametrize("name", _slow(["load-bf16", "load-fp8", "load-pinned"]))
def test_loading_is_measured_from_memory_and_from_the_disk(tmp_path: Path, name: str) -> None:
    path = wan_dit.write_dit(tmp_path, wan_dit.tiny_state("t2v", dtype=torch.bfloat16))
    options = ("--blocks_to_swap", "1") if name == "load-pinned" else BY_NAME[name].options

    found = measure_row(replace(BY_NAME[name], options=options), path, None, CPU)

    assert found["seconds"] > 0
    assert found["per"] == path.stat().st_size / 1e9
    assert (found["forgotten"] is not None) == forget(path)


# Losses


# The command


def test_the_plan_of_all_rows_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--dry", "--rows", "wan14b-bf16", "load-bf16", "gen-lumina"])

    lines = capsys.readouterr().out.splitlines()
    assert (
        "| wan14b-bf16 | goals, training | Wan2.1 14B T2V | 832x480x81 | bf16, eager | 6.19 | 28.6 | "
        in lines[2]
    )
    assert lines[3].startswith("| load-bf16 | loading | Wan2.1 1.3B T2V | - |")
    assert lines[-1].startswith("3 rows, about ")


@pytest.mark.slow
def test_a_row_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    """A file that is there is not written again, so that a tiny one may stand in."""
    row = BY_NAME["cache-llama"]
    save(tmp_path / f"{row.model.manifest}.safetensors", prefixed(llama_tensors(), "model."))

    found = gpu.Job(tmp_path, "cpu").run(row, limit=300)

    assert found["seconds"] > 0
    assert gpu.Job(tmp_path, "cpu").run(row, limit=0.01) == {"failed": "not done after 0 s"}
    assert "cuda" in gpu.Job(tmp_path, "cuda").run(row, limit=300)["failed"].lower()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device; --dry shows the rows without one"):
        gpu.main(["--rows", "gen-flux"])
    with pytest.raises(SystemExit, match="loading has no steps"):
        gpu.main(["--profile", "load-bf16"])


# Without packages that a bare machine lacks

BARE = """
import sys
from dataclasses import replace
from importlib.abc import MetaPathFinder
from pathlib import Path


class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"av", "diffusers", "bitsandbytes", "ftfy", "imageio"}:
            raise ImportError(f"{name} is asked for")


sys.meta_path.insert(0, Missing())
import torch
from benchmarks import gpu
from benchmarks.gpu_measuring import measure_row
from tests.benchmarks.test_gpu import CLIP, CPU, _tiny, _wan

folder = Path(sys.argv[1])
path = _wan("t2v")(folder)
for name, options in (("wan14b-bf16", ("--gradient_checkpointing",)), ("gen-wan14b-t2v", ("--fp8_scaled",))):
    assert measure_row(_tiny(name, CLIP, *options), path, None, CPU, enough=0)["seconds"] > 0
gpu.main(["--dry", "--rows", "gen-flux", "gen-framepack"])
print("done")
"""


def test_rows_need_neither_ffmpeg_nor_diffusers_nor_ftfy(tmp_path: Path) -> None:
    done = run_program(
        *(sys.executable, "-c", BARE, tmp_path), folder=tmp_path, environment={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.endswith("done\n")
