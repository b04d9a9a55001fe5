"""Make pictures between pictures: GIMM-VFI with RAFT or FlowFormer."""
