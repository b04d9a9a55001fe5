"""Compare our umT5 with the class of transformers: start, memory, seconds, and numbers.

    pip install transformers
    python benchmarks/text_encoders.py

Prints ratios of ours to theirs, for networks of the released widths with a few layers, random weights and
captions of unequal lengths. Below 1.0 ours is faster or smaller.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from encoders.t5_network import T5Config  # noqa: E402
from tests.tiny.wan_encoders import t5_hf_tensors  # noqa: E402
from wan.t5 import T5Network  # noqa: E402

LENGTHS = (9, 14, 23, 31, 58, 77, 120, 226)  # tokens of captions: words, sentences, paragraphs
START = (
    "import sys, time, resource; began = time.perf_counter(); import torch, safetensors, tokenizers; "
    "base = time.perf_counter() - began; began = time.perf_counter(); {code}; "
    "print(base, time.perf_counter() - began, "
    "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
)
IMPORTS = {
    "ours": "import wan.t5",
    "transformers": "from transformers import UMT5EncoderModel, CLIPTextModel, CLIPVisionModel",
}


def main() -> None:
    """Print the ratios of start, speed and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="layers of each network")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the fastest counts")
    args = parser.parse_args()
    compare_starts(args.repeats)
    with torch.no_grad():
        compare_t5(args.layers, args.repeats)


def compare_starts(repeats: int) -> None:
    """Print seconds and memory that importing the encoders adds to torch."""
    rows = {}
    for name, code in IMPORTS.items():
        command = [sys.executable, "-c", START.format(code=code)]
        runs = [
            tuple(
                map(float, subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split())
            )
            for _ in range(repeats)
        ]
        rows[name] = min(run[1] for run in runs), min(run[2] for run in runs)
        print(f"start, {name}: {rows[name][0]:.2f} s after torch, {rows[name][1]:.0f} MiB in all")
    print(f"start: ratio of seconds {rows['ours'][0] / rows['transformers'][0]:.2f}")


def compare_t5(layers: int, repeats: int) -> None:
    """Compare umT5 of the released width; transformers pads prompts to the longest, the release to 512."""
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"num_heads": 64, "num_layers": layers}
    ours = T5Network(
        T5Config(vocabulary=1000, dim=4096, attention_dim=4096, ffn_dim=10240, num_buckets=32, **sizes)
    )
    theirs = UMT5EncoderModel(
        UMT5Config(
            vocab_size=1000, d_model=4096, d_kv=64, d_ff=10240, feed_forward_proj="gated-gelu", **sizes
        )
    )
    theirs.load_state_dict(t5_hf_tensors(ours.state_dict()), strict=False)  # shared embedding
    prompts = [torch.randint(1, 1000, (length,)) for length in LENGTHS]
    for length in (max(LENGTHS), 512):
        ids, mask = pad(prompts, length)

        def of_transformers(ids: Tensor = ids, mask: Tensor = mask) -> list[Tensor]:
            states = theirs.eval()(ids, attention_mask=mask).last_hidden_state
            return [row[: len(prompt)] for row, prompt in zip(states, prompts, strict=True)]

        compare(f"umT5, theirs padded to {length}", lambda: ours(prompts), of_transformers, repeats)


def pad(prompts: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, each B L."""
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    return ids, mask


def compare(
    name: str, ours: Callable[[], list[Tensor]], theirs: Callable[[], list[Tensor]], repeats: int
) -> None:
    """Print the ratio of the fastest runs, and the largest difference relative to the largest value."""
    our_seconds, their_seconds = [], []
    for _ in range(repeats):
        for run, seconds in ((ours, our_seconds), (theirs, their_seconds)):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    pairs = list(zip(ours(), theirs(), strict=True))
    difference = max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)
    print(
        f"{name}: ours {min(our_seconds):.2f} s, theirs {min(their_seconds):.2f} s, "
        f"ratio {min(our_seconds) / min(their_seconds):.2f}; largest difference {difference:.1e}"
    )


if __name__ == "__main__":
    main()
