"""Data as they are published or recorded, tiny: tables, tars, a CogVideoX folder, footage."""

import csv
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_tools.cogvideox.making import write_data, write_wan_pipeline
from tests.data_tools.cutting import films
from tests.tiny.project import CAPTIONS
from tests.tiny.vision_model import write_llava


def lay_out_published(folder: Path, site: str) -> None:
    """The clips of `folder`/clips in the forms of docs/dataset_large.md. site: where they are served."""
    clips = sorted((folder / "clips").glob("*.mp4"))
    rows = [{"file": f"clips/{clip.name}", "description": CAPTIONS[0]} for clip in clips]
    with (folder / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file", "description"])
        writer.writeheader()
        writer.writerows(rows)
    named = [{"path": row["file"], "caption": row["description"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(named), folder / "clips.parquet")
    for number, clip in enumerate(clips):
        with tarfile.open(folder / f"clips-{number:03d}.tar", "w") as tar:
            tar.add(clip, f"{number}.mp4")
            tar.add(clip.with_suffix(".txt"), f"{number}.txt")
    lines = [
        json.dumps({"video_path": f"{site}/{clip.name.replace(' ', '%20')}", "caption": CAPTIONS[0]})
        for clip in clips
    ]
    (folder / "addresses.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def lay_out_material(folder: Path) -> None:
    """Footage of two scenes, a folder in CogVideoX form, a pipeline of Wan."""
    (folder / "footage").mkdir()
    film = [*films.scene(1, 50), *films.scene(2, 50)]
    films.write_film(folder / "footage" / "film.mp4", film, Fraction(24))
    write_data(folder / "cogvideox")
    write_wan_pipeline(folder / "models" / "wan_pipeline")


def lay_out_vision_model(folder: Path) -> None:
    """A model that describes pictures. Needs transformers."""
    write_llava(folder / "models" / "vision")
