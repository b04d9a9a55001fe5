#!/bin/bash
# Make one part of the caches. In the folder of Reelsmith, start for each part from 0 to PARTS - 1, anywhere:
#
#   PARTS=4 PART=0 bash docs/clusters/cache.sh
#
# When all are done, start it once with PARTS=1 PART=0: it checks everything and makes what is missing.
set -eu
python wan_cache_latents.py --dataset_config dataset.toml --vae models/Wan2.1_VAE.pth \
  --num_shards "$PARTS" --shard_index "$PART"
python wan_cache_text_encoder_outputs.py --dataset_config dataset.toml \
  --t5 models/models_t5_umt5-xxl-enc-bf16.pth --num_shards "$PARTS" --shard_index "$PART"
