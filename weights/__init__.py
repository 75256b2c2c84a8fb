"""Weights in and out: checkpoints, and the folders of Hugging Face."""
