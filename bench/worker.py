"""One side of bench/compare.py in a process of its own: trains steps, and answers with a line each.

python bench/worker.py SIDE TASK STEPS
"""

import json
import os
import re
import sys
import time
from pathlib import Path

ANSWERS = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
os.dup2(2, 1)
# behind what is installed: some peers have modules of our modules' names
sys.path.append(str(Path(__file__).resolve().parents[1]))


def main() -> None:
    from peers import SIDES, Task, TimedBatches, roof

    name, keys, steps = sys.argv[1:]
    task = Task(**json.loads(keys))
    step = {"roof": roof, **SIDES}[name](task)
    process = getattr(step, "process", None)  # that works for this one
    try:
        for _ in range(int(steps)):
            before, begin = TimedBatches.seconds, time.perf_counter()
            loss = step()
            answer(
                seconds=time.perf_counter() - begin,
                loss=loss,
                loader=TimedBatches.seconds - before,
                flops=getattr(step, "flops", None),
                planned=getattr(step, "planned", None),
                bytes=memory(task.device, process),
            )
    finally:
        if process:
            process.kill()


def memory(device: str, process) -> int:
    """Peak bytes: on the GPU, or of a process (this one, unless another works for it)."""
    if device == "cuda" and process is None:
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path(f"/proc/{process.pid if process else 'self'}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def answer(**what: object) -> None:
    print(json.dumps(what), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
