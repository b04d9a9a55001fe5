"""A run whose stage takes its time: python -m tests.post.run_slowly INPUT OUTPUT; for tests that end it."""

import sys
import time
from dataclasses import replace
from pathlib import Path

from modules.command import command_line
from modules.media.encoding import Picture
from tests.post.stages_here import H264, Same, run_stages


def main() -> None:
    source, output = map(Path, sys.argv[1:3])
    form = replace(H264, keep_pngs=True)
    count = [0]

    def wait(picture: Picture) -> None:
        count[0] += 1
        if count[0] == 4:  # the encoder has its first frames
            sys.stdout.write("at work\n")
            sys.stdout.flush()
        if count[0] > 4:
            time.sleep(0.2)

    run_stages([Same(seen=wait)], source, output, form)


if __name__ == "__main__":
    command_line(main)
