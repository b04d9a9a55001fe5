"""Prepare clips in CogVideoX form: choose frames and sizes, encode, write the folders that trainers read."""
