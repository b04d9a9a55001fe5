"""Make pictures between pictures: GIMM-VFI with RAFT or FlowFormer.

correlation: compare features of pictures around given places
files: find and load the files of GIMM-VFI
flowformer: FlowFormer: optical flow from encoded maps of costs
flowformer_memory: FlowFormer's encoder: maps of costs to tokens
gimm: GIMM-VFI: pictures at any time between two
layers: small layers that the networks of this room share
motion: GIMM: motion at any time between two pictures
options: options of interpolation: rate, model and speed
raft: RAFT, optical flow by refining one estimate over and over
stage: add pictures between those of a stream
synthesis: refine the flow, then blend the picture
twins: first stages of Twins-SVT: features by attention
warping: move pictures along optical flow, and resize
"""
