"""Options of tools/score.py."""

from pathlib import Path

from modules.options import Options, option

MODEL_FOLDER = Path("models/score_clip")  # that tools/download.py fills


class ScoreOptions(Options, title="what to score"):
    """A run, the model that compares pictures, and the pictures that the run learned from."""

    run: Path = option(
        "folder of a run (its --output_dir), or its ...-history.jsonl if the folder has several runs",
        positional=True,
        place="there",
    )
    model: Path = option(
        "folder of a CLIP or SigLIP model as transformers saves it, with its tokenizer and "
        "preprocessor_config.json",
        default=MODEL_FOLDER,
    )
    dataset_config: Path | None = option(
        "dataset of the training pictures, .toml or .json; default: the one that the run was trained on",
        place="file",
    )
    num_frames: int = option(
        "frames of a clip that are compared, evenly spaced", default=8, least=1, most=1024
    )
    batch_size: int = option("pictures that the model sees at a time", default=16, least=1, most=4096)
    device: str | None = option("cuda, cuda:1, mps or cpu (default: the best there is)")
