#!/bin/sh
# Prepare clips in CogVideoX form, on several cards if NUM_GPUS says so: docs/dataset_tools.md
# Set the values here or in front of the command; further options of tools/prepare_dataset.py may follow:
#     DATA_ROOT=cogvideox OUTPUT_DIR=prepared sh prepare_dataset.sh --target_fps 16
set -eu
DATA_ROOT=${DATA_ROOT:?names the folder with the lists of clips and prompts}
OUTPUT_DIR=${OUTPUT_DIR:?names a folder for the prepared data}
MODEL_ID=${MODEL_ID:-} # folder of a pipeline, or its name on the hub; without it nothing is encoded
NUM_GPUS=${NUM_GPUS:-1}
CAPTION_COLUMN=${CAPTION_COLUMN:-prompt.txt}
VIDEO_COLUMN=${VIDEO_COLUMN:-videos.txt}
HEIGHT_BUCKETS=${HEIGHT_BUCKETS:-480}
WIDTH_BUCKETS=${WIDTH_BUCKETS:-720}
FRAME_BUCKETS=${FRAME_BUCKETS:-49}
MAX_NUM_FRAMES=${MAX_NUM_FRAMES:-49}
TARGET_FPS=${TARGET_FPS:-8}
BATCH_SIZE=${BATCH_SIZE:-1}
DTYPE=${DTYPE:-fp32}

if [ -n "$MODEL_ID" ]; then set -- --model_id "$MODEL_ID" --save_latents_and_embeddings "$@"; fi
script=$(dirname "$0")/tools/prepare_dataset.py
if [ "$NUM_GPUS" -gt 1 ]; then
    set -- accelerate launch --quiet --num_processes "$NUM_GPUS" "$script" "$@"
else
    set -- python "$script" "$@"
fi
# the lists of sizes are several words each
# shellcheck disable=SC2086
exec "$@" --data_root "$DATA_ROOT" --output_dir "$OUTPUT_DIR" \
    --caption_column "$CAPTION_COLUMN" --video_column "$VIDEO_COLUMN" \
    --height_buckets $HEIGHT_BUCKETS --width_buckets $WIDTH_BUCKETS --frame_buckets $FRAME_BUCKETS \
    --max_num_frames "$MAX_NUM_FRAMES" --target_fps "$TARGET_FPS" --batch_size "$BATCH_SIZE" --dtype "$DTYPE"
