"""What each input worker of an appliance streams, through the package's own pipeline: as JSON.

workers.py SYSTEMS WORKERS SIZES, then the arguments of train.py. SIZES are the rows that the
compiler gave each system, in parts, such as [[2],[1,1]].
"""

import json
import sys
from functools import partial
from itertools import islice

import numpy as np
import torch
from cerebras.appliance.appliance_client import fw_user_deserialize, fw_user_serialize
from cerebras.pytorch.distributed.cluster_resolver import ApplianceWorkerClusterResolver
from cerebras.pytorch.utils.data.streamer.data_pipe import SampleSpec
from cerebras.pytorch.utils.data.streamer.pytorch_generator import InputGeneratorPyTorch

from configuration import parse_configuration
from dataset import EvalBatches, TrainBatches
from engines.cerebras import read_batches

systems, workers, sizes, split = (json.loads(sys.argv.pop(1)) for _ in range(4))
config, _ = parse_configuration("")
data = (config.dataset, config.vocab_size, config.sequence_length, config.batch_size)
batches = partial(EvalBatches, *data, None) if split == "val" else partial(TrainBatches, *data, 0)
steps = range(len(batches(0, 1))) if split == "val" else range(3, 9)
arguments = (batches, steps, config.batch_size, systems, torch.int32)
sent = [fw_user_serialize(each, recurse=True) for each in (read_batches, (arguments, {}))]

streamed = []
for rank in range(systems * workers):
    ApplianceWorkerClusterResolver.configure(rank, systems * workers, systems, workers)
    function, (given, named) = (fw_user_deserialize(each) for each in sent)
    shape = (max(sizes[rank // workers]), config.sequence_length)
    tensors = [
        SampleSpec.TensorSpec(f"input_{i}", np.dtype(np.int32), shape, tensor_id=i)
        for i in range(2)
    ]
    generator = InputGeneratorPyTorch(
        lambda function=function, given=given, named=named: function(*given, **named),
        SampleSpec(tensors),
        sizes,
    )
    blocks = len(sizes[rank // workers]) * len(steps[rank % workers :: workers])
    streamed.append([[b[0].tolist(), b[1].tolist()] for b in islice(generator, blocks)])
print(json.dumps(streamed))
