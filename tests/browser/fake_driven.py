"""Answer as `generation/json_requests.py` does, without a model. Words in the prompt say what happens.

fail, die, killed, forget (no result), slow (steps until SIGINT), stubborn (the same, and no SIGINT helps). An
option --wrong ends it before it is ready, --dull (loads for ever), --noisy prints other lines. With
--lingering it ends, after its input, when a file `end` lies next to the folder of results.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def tell(event: str, **facts: object) -> None:
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def make(request: dict[str, object], folder: Path) -> None:
    """Make one result, or what the prompt asks for."""
    prompt = str(request["prompt"])
    tell("begun", steps=3)
    tell("phase", what="reading the prompt")
    if "fail" in prompt:
        tell("failed", reason="OptionError: there is no such thing")
        return
    if "die" in prompt:
        sys.stderr.write("some line\nValueError: it has burst\n")
        raise SystemExit(1)
    if "killed" in prompt:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    if "forget" in prompt:
        return
    if "stubborn" in prompt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    preview = Path(os.environ["REELSMITH_DRIVEN"]) / "latent_preview.png"
    preview.parent.mkdir(parents=True, exist_ok=True)
    preview.write_bytes(b"a preview")
    for done in range(1, 10_000 if "slow" in prompt or "stubborn" in prompt else 4):
        tell("step", done=done)
        time.sleep(0.05 if done > 3 else 0)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{len(list(folder.iterdir()))}.png"
    path.write_text(json.dumps(request))
    tell("made", file=str(path))


def main(words: list[str]) -> None:
    if "--wrong" in words:
        sys.stderr.write("CheckpointError: models/x.safetensors does not fit --task t2v-14B\n")
        raise SystemExit(2)
    if "--dull" in words:
        time.sleep(600)
    if "--noisy" in words:
        print("Welcome to a library")  # noqa: T201
        print([1, 2])  # noqa: T201
    # as `generation/json_requests.py`: tests that a script starts in the background would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tell("ready")
    for line in sys.stdin:
        try:
            make(json.loads(line), Path(words[words.index("--save_path") + 1]))
        except KeyboardInterrupt:
            tell("cancelled")
        tell("ready")
    if "--lingering" in words:
        while not (Path(words[words.index("--save_path") + 1]).parent / "end").exists():
            time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1:])
