"""Lowers a step of training, an evaluation and a step again in one process, as train.py executes
them on a cluster: executions.py, then the arguments of train.py, with cluster.validate_only.
Prints, as JSON, on which backend each operation was run: lazily on the package's, whose counters
are named lazy::, or fallen back to the CPU, aten::."""

import json
from functools import partial

import torch._lazy.metrics

from engines import open_engine
from engines.cerebras import read_sequences
from planner.resolve import resolve
from runtime.arguments import parse_configuration
from runtime.distributed import Group
from runtime.resume import Start

config = resolve(parse_configuration("")[0], {}).config
train, (val,), _ = Start(config).open_data(config, Group())
engine = open_engine(config)
engine.initialize()
assert list(engine._execute(train, 0, 1)) == []
get = partial(read_sequences, val, config.batch_size)
assert engine._evaluate(get, range(-(-len(val) // config.batch_size))) == 0.0
assert list(engine._execute(train, 1, 2)) == []
print(json.dumps([name for name in torch._lazy.metrics.counter_names() if "::" in name]))
