"""Trains as train.py does, and tells on which backend each operation of the step was run: lazily on
the package's, whose counters are named lazy::, or fallen back to the CPU, aten::. As JSON."""

import json
import sys

import torch._lazy.metrics

import train
from common.console import command

try:
    command(train.main)
except SystemExit as end:
    counters = [name for name in torch._lazy.metrics.counter_names() if "::" in name]
    print(json.dumps({"status": end.code or 0, "counters": counters}))
    sys.exit(end.code)
