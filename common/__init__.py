"""What every other folder stands on: messages, complete files, token files and their order."""

import os

# A thread of OpenMP that waits for others spins before it sleeps, by default for milliseconds. Next
# to another busy process it so keeps the core from those that it waits for. OpenMP reads this when
# torch is loaded, so commands import this folder first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
