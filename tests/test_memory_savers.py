"""What saves memory saves it: the most bytes that scripts hold at once beside files, against their models."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import ROOT, run_in_processes, run_python
from tests.tiny import wan_encoders
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_dit import tiny_state, write_dit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what no file has")

LAYERS = 12
SIZES = {"dim": 256, "ffn_dim": 1024, "num_heads": 2, "num_layers": LAYERS}
WIDE, ROWS = 24, 320_000  # of the VAE, and of the text encoder's embedding
SLACK = 12_000_000  # bytes: activations, and the interpreter's objects

MODELS = "--dit M/dit.safetensors --vae M/vae.safetensors --t5 M/t5.safetensors"
MAKES = (
    f"{MODELS} --video_size 32 32 --video_length 5 --infer_steps 4 --flow_shift 5 --seed 1 --save_path out"
)
ONE = f"wan_generate_video.py --task t2v-1.3B {MAKES} --prompt cat"
PAIR = f"{ONE} --dit_high_noise M/dit_high.safetensors --task t2v-A14B --output_type latent"
FEW_TEXTS = ONE.replace("M/t5", "small/t5")


@dataclass(frozen=True)
class Saver:
    """A command line, and the networks that it may hold at once, as shares of their files in float32."""

    words: str
    dit: float = 0
    texts: float = 0
    vae: float = 0
    processes: int = 1


# of two processes: their part, and on a CPU a block gathered, its copy and its part (docs/speed.md)
SHARED = 0.5 + 2.5 / LAYERS
SAVERS = {
    "lazy": Saver(f"{PAIR} --lazy_loading", dit=1),
    "shards": Saver(f"{FEW_TEXTS} --shard_base", dit=SHARED, processes=2),
    "texts and VAE beside no transformer": Saver(ONE, dit=1),
    "lines of a file": Saver(f"{ONE} --from_file prompts.txt", dit=1),
    "lazy lines": Saver(f"{PAIR} --lazy_loading --from_file prompts.txt", dit=1),
    "16 bits": Saver(f"{FEW_TEXTS} --dit_dtype bfloat16", dit=0.5),
    "passes of two processes": Saver(f"{ONE} --cfg_parallel", dit=1, processes=2),
}
DAILY = {"lazy", "shards"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write small and large models, and prompts."""
    folder = tmp_path_factory.mktemp("savers")
    (folder / "prompts.txt").write_text("cat --w 32 --h 32 --f 5 --s 2\n" * 2, encoding="utf-8")
    for name in ("small", "large"):
        write_tiny_wan(folder / name, experts=2)
    for seed, name in enumerate(("dit", "dit_high")):
        write_dit(folder / "large", tiny_state("t2v", seed=seed, **SIZES), name=name)
    texts = wan_encoders.t5_tensors()
    texts["token_embedding.weight"] = torch.randn(ROWS, wan_encoders.TEXT_DIM)
    save_file(texts, folder / "large" / "t5.safetensors")
    save_file(wan_encoders.vae_tensors(WIDE), folder / "large" / "vae.safetensors")
    return folder


def most(folder: Path, saver: Saver) -> list[int]:
    """Return the most bytes that each process holds."""
    commands = [saver.words.replace("M/", f"{size}/").split() for size in ("small", "large")]
    file = folder / "commands.json"
    file.write_text(json.dumps(commands), encoding="ascii")
    if saver.processes == 1:
        run_python(ROOT / "tests" / "anonymous_memory.py", file, folder=folder)
    else:
        run_in_processes(saver.processes, "tests/anonymous_memory.py", file, folder=folder)
    found = [Path(f"{file}.{rank}") for rank in range(saver.processes)]
    return [int(path.read_text(encoding="ascii")) for path in found]


@pytest.mark.parametrize(
    "name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.slow) for name in SAVERS]
)
def test_no_process_holds_more_than_it_has_to(project: Path, name: str) -> None:
    saver = SAVERS[name]
    shares = {"dit": saver.dit, "t5": saver.texts, "vae": saver.vae}
    allowed = sum(
        share * (project / "large" / f"{part}.safetensors").stat().st_size for part, share in shares.items()
    )

    assert max(most(project, saver)) < allowed + SLACK
