"""What each input worker of an appliance streams, through the package's own pipeline.

workers.py send FILE SPLIT, then the arguments of train.py, writes what the engine would send;
workers.py stream FILE CASES, in a process that knows no more than a worker, prints the batches of
each case as JSON. A case has the systems, the workers of each, and the rows that the compiler gave
each system, in parts: [2, 1, [[2], [1, 1]]].
"""

import json
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from cerebras.appliance.appliance_client import fw_user_deserialize, fw_user_serialize
from cerebras.pytorch.distributed.cluster_resolver import ApplianceWorkerClusterResolver
from cerebras.pytorch.utils.data.streamer.data_pipe import SampleSpec
from cerebras.pytorch.utils.data.streamer.pytorch_generator import InputGeneratorPyTorch


def send(file: str, split: str) -> None:
    from engines.cerebras import make_cluster_config, read_batches, read_sequences
    from planner.resolve import resolve
    from runtime.arguments import parse_configuration
    from runtime.distributed import Group
    from runtime.resume import Start

    config = resolve(parse_configuration("")[0], {}).config
    train, (val,), _ = Start(config).open_data(config, Group())
    get, steps = train.get, range(3, 9)
    if split == "val":
        get = partial(read_sequences, val, config.batch_size)
        steps = range(-(-len(val) // config.batch_size))
    arguments = ((get, steps, config.batch_size, torch.int32), {})
    content = {
        "sent": [fw_user_serialize(each, recurse=True) for each in (read_batches, arguments)],
        "paths": make_cluster_config(config).python_paths,
        "steps": len(steps),
        "length": config.sequence_length,
    }
    Path(file).write_text(json.dumps(content))


def stream(content: dict, systems: int, workers: int, sizes: list[list[int]]) -> list:
    streamed = []
    for rank in range(systems * workers):
        ApplianceWorkerClusterResolver.configure(rank, systems * workers, systems, workers)
        function, (given, named) = (fw_user_deserialize(each) for each in content["sent"])
        parts = sizes[rank // workers]
        shape = (max(parts), content["length"])
        tensors = [
            SampleSpec.TensorSpec(f"input_{i}", np.dtype(np.int32), shape, tensor_id=i)
            for i in range(2)
        ]
        generator = InputGeneratorPyTorch(
            lambda function=function, given=given, named=named: function(*given, **named),
            SampleSpec(tensors),
            sizes,
        )
        blocks = len(parts) * len(range(content["steps"])[rank % workers :: workers])
        streamed.append([[b[0].tolist(), b[1].tolist()] for b in islice(generator, blocks)])
    return streamed


if sys.argv.pop(1) == "send":
    send(sys.argv.pop(1), sys.argv.pop(1))
else:
    content = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([stream(content, *case) for case in json.loads(sys.argv[2])]))
