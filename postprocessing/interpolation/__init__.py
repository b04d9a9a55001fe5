"""Insert frames between frames: GIMM-VFI with RAFT or FlowFormer.

files: find and load the files of GIMM-VFI
flowformer: FlowFormer: optical flow from encoded cost maps
flowformer_memory: FlowFormer's encoder: cost maps to tokens
layers: small layers, warps and comparisons of features
motion: GIMM-VFI: motion and frames at any time between two
raft: RAFT, optical flow by refining one estimate over and over
stage: insert frames into a stream
synthesis: refine the flow, then blend the frame
twins: first stages of Twins-SVT: features by attention
"""
