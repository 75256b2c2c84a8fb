"""What surrounds a run: where it starts, processes, records, sample texts."""
