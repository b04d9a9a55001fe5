"""Noise schedules and the solvers that follow them.

schedule: rectified flow: path, time shift, noise levels
solvers: follow a predicted velocity from noise to data
"""
