"""What surrounds a run: console, files, checkpoints, metrics, processes."""
