"""Saves what an appliance would be sent first, with the package's own save.

loaded.py FOLDER, then the arguments of train.py. Writes first/*.safetensors there, in the form of
a checkpoint's files, and prints, as JSON, the powers of beta and the steps of the schedules.
"""

import json
import sys
from pathlib import Path

import cerebras.pytorch as cstorch
from safetensors.torch import save_file

from engines import open_engine
from planner.resolve import resolve
from runtime.arguments import parse_configuration
from runtime.distributed import Group
from runtime.resume import find_start

folder = Path(sys.argv.pop(1))
config, _ = parse_configuration("")
start = find_start(config, Group())
engine = open_engine(resolve(start.config, start.resolved_before).config)
if start.read is None:
    engine.initialize()
else:
    engine.load(start.read, start.checkpoint and start.checkpoint.optimizer_steps)
state = {"model": engine.model.state_dict(), "optimizer": engine.optimizer.state_dict()}
state["schedule"] = engine.schedule.state_dict()
engine.saved = folder / "first.h5"
cstorch.save(state, engine.saved)
saved = cstorch.load(engine.saved)
states = saved["optimizer"]["state"].values()
powers = {(state["beta1_power"].item(), state["beta2_power"].item()) for state in states}
schedules = [saved["schedule"], *saved["schedule"]["_schedulers"]]
steps = [schedule["last_epoch"].item() for schedule in schedules]
print(json.dumps({"powers": sorted(powers), "steps": steps}))
(folder / "first").mkdir()
for name, tensors in engine.state():
    save_file(tensors, folder / "first" / f"{name}.safetensors")
