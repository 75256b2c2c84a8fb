"""Our training step compared with others', on the same shape and tokens: python bench/compare.py

Each side trains in a process of its own, in its own environment where it needs one (--peers_python,
as `make bench` has it), and ends before the next begins, so that each has the machine to itself. In
every round `base` and each of `sides` train some steps, and then a matrix product is timed: the
roof. Prints tokens a second of the best step, their share of the roof by 6 · parameters · tokens
(MFU), peak memory, seconds from the start of the process to the end of its first step, the largest
part of a step in which it waited for data, FLOP/s with attention's own and what is computed again,
and the base's speed over the side's: by the best steps, and the lowest and highest of the rounds.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
from jsonargparse import auto_cli

sys.path.append(str(Path(__file__).resolve().parents[1]))
from peers import NOTES, SIDES, Task, end_with_parent

from common.console import UserError, command
from common.tokens import write_meta
from configuration import Configuration
from planner.costs import count
from planner.search import MOST_TOKENS

ELSEWHERE = ("litgpt", "deepspeed")  # in the environment of --peers_python
CHECKOUTS = ("nanogpt", "gigagpt")  # need a checkout
CORPUS = 4_000_000  # random tokens
LAST_WORDS = 60  # lines that are kept of a side that failed
Steps = list[dict]  # what bench/worker.py answers to each step of a process


def main(
    base: str = "resident",
    sides: list[str] = ["transformers", "transformers-compiled"],  # noqa: B006
    width: int = 768,
    depth: int = 10,
    heads: int | None = None,
    vocab_size: int = 50257,
    sequence_length: int = 1024,
    tokens: int = 2048,
    micro_batch_size: int | None = None,
    rounds: int = 2,
    steps: int = 2,
    name: str | None = None,
    out: str | None = None,
    peers_python: str | None = None,
    nanogpt: str | None = None,
    gigagpt: str | None = None,
    llama: bool = False,
    host_memory: str | None = None,
    memory_limit: str | None = None,
    activation_checkpointing: bool | Literal["auto"] = "auto",
) -> None:
    """Compares training steps.

    Args:
        base: the side that the others are compared with
        sides: the others, of those in bench/peers.py
        width: of the model, as depth and vocab_size
        heads: of a block; null: one for every 64 of the width
        tokens: in a step
        micro_batch_size: sequences in one forward pass of every side; null: as many as ours takes
            where it has the memory
        rounds: how often each side trains
        steps: of a side in each round that count, after one more to warm up
        name: what the result is called
        out: a file to which the result is appended as a line of JSON
        peers_python: the interpreter of an environment with litgpt and DeepSpeed
        nanogpt: a checkout of it
        gigagpt: a checkout of the original
        llama: a Llama with as many parameters in a block, instead of GPT-2
        host_memory: as in train.py, for our sides
        memory_limit: as in train.py, for our sides
        activation_checkpointing: as in train.py, for our sides
    """
    names = [base, *sides]
    check(names, {"nanogpt": nanogpt, "gigagpt": gigagpt}, peers_python)
    settings = {"host_memory": host_memory, "memory_limit": memory_limit}
    settings["activation_checkpointing"] = activation_checkpointing
    with TemporaryDirectory() as folder:
        write_corpus(Path(folder), vocab_size)
        task = Task(
            width=width,
            depth=depth,
            heads=heads or width // 64,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            batch_size=tokens // sequence_length,
            micro_batch_size=0,
            data=folder,
            scratch=folder,
            settings=settings,
            nanogpt=nanogpt and str(Path(nanogpt).absolute()),
            gigagpt=gigagpt and str(Path(gigagpt).absolute()),
            llama=llama,
        )
        fast = max(1, MOST_TOKENS["GPU" if task.device == "cuda" else "CPU"] // sequence_length)
        task.micro_batch_size = micro_batch_size or min(fast, task.batch_size)
        line = {"name": name, **compare(names, task, rounds, steps, peers_python)}
    print(json.dumps(line))
    if out:
        with open(out, "a") as file:
            file.write(f"{json.dumps(line)}\n")
    if "error" in line["sides"][base]:
        raise UserError(f"{base}: {last_word(line['sides'][base])}")


def check(names: list[str], checkouts: dict, peers_python: str | None) -> None:
    for name in names:
        if name not in SIDES:
            raise UserError(f"sides: {name} is not known; known are {', '.join(SIDES)}")
        kind = name.split("-")[0]
        if kind in ELSEWHERE and peers_python is None:
            raise UserError(f"sides: {name} needs --peers_python; make bench makes its environment")
        if kind in CHECKOUTS and not Path(checkouts[kind] or "none", "train.py").is_file():
            raise UserError(f"sides: {name} needs --{kind} and a folder with its checkout")


def write_corpus(folder: Path, vocab_size: int) -> None:
    random = np.random.RandomState(0)
    counts = {"train": CORPUS, "val": 100_000}
    for split, tokens in counts.items():
        random.randint(0, vocab_size, tokens).astype("<u2").tofile(folder / f"{split}.bin")
    write_meta(folder, {"dtype": "uint16", "vocab_size": vocab_size})


def compare(
    names: list[str], task: Task, rounds: int, steps: int, peers_python: str | None
) -> dict:
    """The result as it is written: the first name's side beside each of the others."""
    processes: dict[str, list[Steps]] = {name: [] for name in names}  # of each round
    failed, flops = {}, 0.0
    for _ in range(rounds):
        for name in [name for name in names if name not in failed]:
            elsewhere = name.split("-")[0] in ELSEWHERE
            python = peers_python if elsewhere else sys.executable
            try:
                processes[name].append(train(name, task, python, 1 + steps))
            except ChildProcessError as error:
                failed[name] = {"error": str(error)}
                say(f"{name} failed:\n{error}")
        roof = train("roof", task, sys.executable, 1)
        flops = max(flops, roof[0]["flops"])
    results = {}
    for name in names:
        results[name] = failed.get(name) or told(name, processes[name], task, flops)
        if not {name, names[0]} & failed.keys() and name != names[0]:
            results[name] |= compared(processes[names[0]], processes[name])
    show(results, flops, task.precision)
    shape = {key: value for key, value in asdict(task).items() if isinstance(value, int)}
    shape |= {"parameters": parameters(task), "base": names[0], **task.settings}
    return {**shape, "roof": flops, "precision": task.precision, "sides": results}


def train(name: str, task: Task, python: str, steps: int) -> Steps:
    """Trains steps of a side in a process of its own, which has ended then. Raises
    ChildProcessError, with its last words, where it failed."""
    began, answers, log = time.perf_counter(), [], Path(task.scratch, f"{name}.log")
    words = [python, str(Path(__file__).with_name("worker.py")), name, json.dumps(asdict(task))]
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [*words, str(steps)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=end_with_parent,
        )
        for line in process.stdout:
            answers.append({**json.loads(line), "since_start": time.perf_counter() - began})
            say(f"{name}: {answers[-1]['seconds']:.2f} s")
    if process.wait() != 0:
        lines = log.read_text(errors="replace").strip().splitlines()[-LAST_WORDS:]
        if process.returncode < 0 or not lines:
            lines.append(f"it ended with status {process.returncode}")
        raise ChildProcessError("\n".join(lines))
    return answers


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def last_word(result: dict) -> str:
    return result["error"].splitlines()[-1]


def told(name: str, processes: list[Steps], task: Task, flops: float) -> dict:
    """A side's figures, from all steps but the first of each process."""
    steps = [step for answers in processes for step in answers[1:]]
    seconds = [step["seconds"] for step in steps]
    rate = task.batch_size * task.sequence_length / min(seconds)
    flops_done = steps[-1]["flops"]
    note = {"note": NOTES[name]} if name in NOTES else {}
    return {
        "tokens_per_second": rate,
        "mfu": rate * 6 * parameters(task) / flops,
        "spread": max(seconds) / min(seconds),
        "peak_bytes": max(step["bytes"] for step in steps),
        "first_step_seconds": processes[0][0]["since_start"],
        "loader": max(step["loader"] / step["seconds"] for step in steps),
        "loss": steps[-1]["loss"],
        # with attention's own and what is computed again, where it is known
        "hardware_flops": flops_done and flops_done / min(seconds),
        "planned": steps[-1]["planned"],
        **note,
    }


def compared(base: list[Steps], side: list[Steps]) -> dict:
    """The base's speed over a side's, by the best steps of all and of each round."""
    best = [[min(step["seconds"] for step in run[1:]) for run in runs] for runs in (base, side)]
    ratios = [theirs / ours for ours, theirs in zip(*best, strict=True)]
    return {
        "ratio": min(best[1]) / min(best[0]),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def show(results: dict[str, dict], flops: float, precision: str) -> None:
    print(f"{'':<22}  tokens/s    MFU  peak GB  first step  loader   TFLOP/s    loss  ratio")
    for name, result in results.items():
        if "error" in result:
            print(f"{name:<22}  failed: {last_word(result)}")
            continue
        text = f"{name:<22}{result['tokens_per_second']:>10,.1f}{result['mfu']:>7.1%}"
        text += f"{result['peak_bytes'] / 1e9:>9.2f}{result['first_step_seconds']:>10.1f} s"
        text += f"{result['loader']:>8.2%}{(result['hardware_flops'] or 0) / 1e12:>10.3f}"
        text += f"{result['loss']:>8.3f}"
        if "ratio" in result:
            text += "{ratio:>7.2f} ({lowest:.2f} to {highest:.2f})".format(**result)
        print(text)
        if "note" in result:
            print(f"{'':<22}  {result['note']}")
    print(f"roof: {flops / 1e12:.3f} TFLOP/s, {precision}")


def parameters(task: Task) -> int:
    return count(Configuration(**task.shape, sequence_length=task.sequence_length))


if __name__ == "__main__":
    command(lambda: auto_cli(main, as_positional=False))
