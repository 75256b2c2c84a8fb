"""Lowers a step of training, an evaluation and a step again in one process, as train.py executes
them on a cluster: executions.py, then the arguments of train.py, with cluster.validate_only."""

import plan
from configuration import parse_configuration
from engines import open_engine
from resume import Start
from systems import World

config = plan.resolve(parse_configuration("")[0], {}).config
train, val = Start(config).open_data(config, World())
engine = open_engine(config)
engine.initialize()
assert list(engine._execute(train.share, 0, 1)) == []
assert engine._evaluate(val.share) == 0.0
assert list(engine._execute(train.share, 1, 2)) == []
