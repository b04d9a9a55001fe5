"""Write a tiny Wan2.1 with random weights in the released file layout, for a first run where no checkpoint is at hand.

python -m pocket.random_model FOLDER
"""

import sys
from pathlib import Path

from tests.tiny.wan import write_tiny_wan

if __name__ == "__main__":
    write_tiny_wan(Path(sys.argv[1]), "t2v")
