"""Read files one after the other, and print the most memory of each: `python memory_of_pictures.py FILE ...`.

Each line has the bytes for a pixel of the picture beside what the process had before, or why it is not read.
"""

import gc
import re
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from modules.devices import release_heap  # noqa: E402
from modules.errors import MediaError  # noqa: E402
from modules.media.reading import media_colors, read_image, read_mask  # noqa: E402

STATUS = Path("/proc/self/status")
FORGET = Path("/proc/self/clear_refs")  # "5": the most is what there is now
WAYS = {"read": read_image, "alpha": lambda path: read_image(path, alpha=True), "mask": read_mask}
WAYS["look"] = media_colors  # type: ignore[assignment]


def read_number(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    return 0 if found is None else int(found[1]) * 1024


def main() -> None:
    pixels = int(sys.argv[1])
    for name in sys.argv[2:]:
        way, _, path = name.partition("=")
        gc.collect()
        release_heap()
        FORGET.write_text("5", encoding="ascii")
        before = read_number("VmRSS")
        try:
            WAYS[way](Path(path))
        except MediaError as error:
            sys.stdout.write(f"{error}\n")
            continue
        sys.stdout.write(f"{(read_number('VmHWM') - before) / pixels:.2f}\n")


if __name__ == "__main__":
    main()
