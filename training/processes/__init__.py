"""Processes and their precision.

accelerator: the accelerator: device, mixed precision, processes and trackers
gradients: sum gradients over processes in flat buffers
lost: recognise and find a lost process
options: options of mixed precision and several processes
"""
