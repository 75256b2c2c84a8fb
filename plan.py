"""Plans a run, before anything is allocated: python plan.py CONFIG [--key value ...]

Which engine would run, bytes in each tier, seconds a step and the time to the end; where the model
does not fit, what is missing and what would fit.
"""

import json
from dataclasses import replace

from common.console import UserError, command, warn  # before torch

# isort: split
import torch

from planner.costs import eval_tokens
from planner.machine import DEVICES, named_machine, parse_bytes, this_machine
from planner.report import describe, refusal, size_text, summary, table, time_text, warnings
from planner.resolve import check_engine, resolve_device
from planner.search import closest, engine_plans
from runtime.arguments import parse_configuration
from runtime.resume import open_weights


def main() -> int:
    config, options = parse_configuration(
        "Plan a run.",
        json=(bool, "print the plan as JSON"),
        device=(str, f"plan for this GPU instead of this machine: {', '.join(DEVICES)}"),
        disk=(str, "free space where the streaming engine keeps its files, such as 8TB"),
    )
    if config.backend == "CSX" or config.engine == "cerebras":
        raise UserError(
            "a run on Cerebras systems is planned by their cluster; python train.py CONFIG "
            "--backend CSX --cluster.validate_only true lowers a step for it on this machine"
        )
    config = open_weights(config, None).config
    if options["device"] is None:
        config = resolve_device(config, {})
        gpus = torch.cuda.device_count() if config.backend == "GPU" else config.num_systems
        machine = this_machine(config, min(config.num_systems, gpus))
    else:
        check_engine(config)
        precision = "bf16" if config.precision == "auto" else config.precision
        config = replace(config, backend="GPU", precision=precision)
        machine = named_machine(options["device"], config)
    if options["disk"] is not None:
        machine.disk = parse_bytes(options["disk"], "disk")
    plans = engine_plans(config, machine)
    plan = closest(plans)
    if options["json"]:
        print(json.dumps(summary(plan)))
        return 2 if plan.missing else 0
    print("\n".join(table(plans)))
    if machine.on_gpu and config.host_memory is None:
        each = size_text(machine.host)
        host = size_text(machine.host * machine.processes)
        print(f"host memory: {each} a GPU, this machine's {host} shared; --host_memory sets it")
    if plan.missing:
        print(refusal(config, plan))
        return 2
    print(describe(plan))
    for line in warnings(plan):
        warn(line)
    if not eval_tokens(config):
        print(f"without evaluations: {config.dataset} is not prepared")
    compute = time_text(plan.total("compute"))
    transfer = time_text(plan.total("transfer"))
    print(f"{plan.limit} is the limit: a step computes for {compute} and transfers for {transfer}")
    return 0


if __name__ == "__main__":
    command(main)
