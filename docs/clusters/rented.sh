#!/bin/bash
# Train a packed folder on a rented card, and go on after an interruption. In the folder of Reelsmith, which
# lies on a disk that stays:
#
#   bash docs/clusters/rented.sh ../clips-pack.zip "sudo poweroff"
#
# The second word is the command that ends the costs, started when the run is over; without it the machine
# stays. The folder and the models are made next to the file. Type the same again: it continues.
set -eu
pack=${1:-}
case $pack in -*) pack=./$pack ;; esac # a name, no option of the commands below
folder=${pack%-pack.zip}
if [ "$folder" = "$pack" ] || { [ ! -d "$folder" ] && [ ! -f "$pack" ]; }; then
  echo "rented.sh: '$pack' is not a packed folder. Give the file that pack has made, NAME-pack.zip" >&2
  exit 2
fi
models=$(dirname "$pack")/models
if [ -z "${PYTHON:-}" ]; then # of an environment that is there
  PYTHON=.venv/bin/python
  if [ ! -e .venv/is_complete ]; then
    python3 -m venv .venv
    "$PYTHON" -m pip install torch==2.13.0 --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cu130}"
    "$PYTHON" -m pip install -r requirements.txt
    touch .venv/is_complete
  fi
fi
if [ ! -d "$folder" ]; then
  "$PYTHON" reelsmith.py unpack "$pack" "$folder" --models "$models"
fi
exec "$PYTHON" reelsmith.py run "$folder" --download --models "$models" ${2:+--on_end "$2"}
