#!/bin/bash
# Train on several machines. In the folder of Reelsmith, start on each of them:
#
#   HEAD=192.168.1.10 MACHINES=2 bash docs/clusters/torchrun.sh
#
# HEAD is the address of one of them, by which all reach it; words behind the file's name are further options
# of the training. If a process dies, all start again from the newest state, three times at most.
set -eu
exec torchrun --nnodes "$MACHINES" --nproc-per-node "${CARDS:-gpu}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "${RUN:-my_lora}" --rdzv-endpoint "$HEAD:${PORT:-29400}" \
  wan_train_network.py --task t2v-1.3B --dit models/wan2.1_t2v_1.3B_bf16.safetensors \
  --dataset_config dataset.toml --sdpa --mixed_precision bf16 --gradient_checkpointing \
  --network_module networks.lora_wan --network_dim 32 --network_alpha 16 --timestep_sampling shift --discrete_flow_shift 3.0 \
  --optimizer_type adamw --learning_rate 2e-4 --max_train_epochs 16 --seed 42 \
  --output_dir "${OUTPUT:-output}" --output_name my_lora \
  --save_every_n_steps 200 --save_last_n_steps 400 --save_state --resume latest "$@"
