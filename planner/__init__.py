"""Estimates memory and time before anything is allocated, and chooses how to run."""
