"""Insert frames between frames: GIMM-VFI with RAFT or FlowFormer."""
