"""Our training step beside others', on the same shape and tokens: python bench/compare.py

Each side is a process of its own, in its own environment where it needs one (--peers_python, as
`make bench` has it). `base` and each of `sides` in turn train a step, and after each a matrix
product is timed: the roof. Prints tokens a second of the best step, their share of the roof by
6 · parameters · tokens (MFU), peak memory, seconds from the start of the process to the end of its
first step, the largest part of a step in which it waited for data, FLOP/s with attention's own and
what is computed again, and the base's speed over the side's: by the best steps, and the lowest and
highest of the rounds.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jsonargparse import auto_cli

sys.path.append(str(Path(__file__).resolve().parents[1]))
from peers import SIDES, Task

from configuration import Configuration
from engines.base import has_units
from planner.costs import count
from runtime.console import UserError, command
from runtime.tokens import write_meta

ELSEWHERE = ("litgpt", "deepspeed")  # in the environment of --peers_python
CHECKOUTS = ("nanogpt", "gigagpt")  # need a checkout
CORPUS = 4_000_000  # random tokens


class Side:
    """A process that trains a step when it is told to."""

    def __init__(self, name: str, task: Task, python: str):
        self.began, self.results, self.log = time.perf_counter(), [], Path(task.scratch, name)
        command = [
            python,
            str(Path(__file__).with_name("worker.py")),
            name,
            json.dumps(asdict(task)),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stderr=log, text=True, bufsize=1, **pipes)

    def step(self, order: str = "") -> dict:
        """Raises ChildProcessError, with its last word, for a process that has ended."""
        try:
            self.process.stdin.write(f"{order}\n")
            self.results.append(json.loads(self.process.stdout.readline()))
        except (BrokenPipeError, ValueError):
            words = self.log.read_text(errors="replace").strip().splitlines() or ["no word"]
            raise ChildProcessError(words[-1]) from None
        if len(self.results) == 1:
            self.first = time.perf_counter() - self.began
        return self.results[-1]

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


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
    rounds: int = 4,
    name: str | None = None,
    out: str | None = None,
    peers_python: str | None = None,
    nanogpt: str | None = None,
    gigagpt: str | None = None,
    llama: bool = False,
) -> None:
    """Compares training steps.

    Args:
        base: the side that the others are compared with
        sides: the others, of those in bench/peers.py
        width: of the model, as depth and vocab_size
        heads: of a block; null: one for every 64 of the width
        tokens: in a step
        micro_batch_size: sequences in one forward pass; null: ours chooses
        rounds: steps of each side that count, after one more to warm up
        name: what the result is called
        out: a file to which the result is appended as a line of JSON
        peers_python: the interpreter of an environment with litgpt and DeepSpeed
        nanogpt: a checkout of it
        gigagpt: a checkout of the original
        llama: a Llama with as many parameters in a block, instead of GPT-2
    """
    names = [base, *sides]
    check(names, {"nanogpt": nanogpt, "gigagpt": gigagpt}, peers_python)
    with TemporaryDirectory() as folder:
        write_corpus(Path(folder), vocab_size)
        task = Task(
            width=width,
            depth=depth,
            heads=heads or width // 64,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            batch_size=tokens // sequence_length,
            micro_batch_size=micro_batch_size,
            data=folder,
            scratch=folder,
            nanogpt=nanogpt and str(Path(nanogpt).absolute()),
            gigagpt=gigagpt and str(Path(gigagpt).absolute()),
            llama=llama,
        )
        try:
            line = {"name": name, **compare(names, task, rounds, peers_python)}
        except ChildProcessError as error:
            raise UserError(f"{base}: {error}") from None
    print(json.dumps(line))
    if out:
        with open(out, "a") as file:
            file.write(f"{json.dumps(line)}\n")


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


def compare(names: list[str], task: Task, rounds: int, peers_python: str | None) -> dict:
    """The result as it is written: the first name's side beside each of the others."""

    def start(name: str) -> Side:
        elsewhere = name.split("-")[0] in ELSEWHERE
        return Side(name, task, peers_python if elsewhere else sys.executable)

    def timed(side: Side) -> float:
        seconds = side.step()["seconds"]
        roof.step(precision)
        say(f"{side.log.name}: {seconds:.2f} s")
        return seconds

    precision = "bf16" if task.device == "cuda" or has_units("amx_bf16", "avx512_bf16") else "fp32"
    roof, base = start("roof"), start(names[0])
    base.step()
    for _ in range(1 if names[1:] else rounds):
        timed(base)
    pairs, failed = {}, {}
    for name in names[1:]:
        side = start(name)
        try:
            side.step()
            pairs[side] = [(timed(base), timed(side)) for _ in range(rounds)]
        except ChildProcessError as error:
            failed[name] = {"error": str(error)}
            say(f"{name} failed: {error}")
        side.close()
    base.close()
    roof.close()
    flops = max(result["flops"] for result in roof.results)
    results = {side.log.name: told(side, task, flops) for side in (base, *pairs)} | failed
    for side, seconds in pairs.items():
        mine, theirs = zip(*seconds, strict=True)
        ratios = [b / a for a, b in seconds]
        more = {"ratio": min(theirs) / min(mine), "lowest": min(ratios), "highest": max(ratios)}
        results[side.log.name] |= more
    show(results, flops, precision)
    shape = {key: value for key, value in asdict(task).items() if isinstance(value, int)}
    shape |= {"parameters": parameters(task), "base": names[0]}
    return {**shape, "roof": flops, "precision": precision, "sides": results}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def told(side: Side, task: Task, flops: float) -> dict:
    """A side's figures, from all of its steps but the first."""
    seconds = [result["seconds"] for result in side.results[1:]]
    rate = task.batch_size * task.sequence_length / min(seconds)
    flops_done = side.results[-1]["flops"]
    return {
        "tokens_per_second": rate,
        "mfu": rate * 6 * parameters(task) / flops,
        "spread": max(seconds) / min(seconds),
        "peak_bytes": side.results[-1]["bytes"],
        "first_step_seconds": side.first,
        "loader": max(r["loader"] / r["seconds"] for r in side.results[1:]),
        "loss": side.results[-1]["loss"],
        # with attention's own and what is computed again, where it is known
        "hardware_flops": flops_done and flops_done / min(seconds),
    }


def show(results: dict[str, dict], flops: float, precision: str) -> None:
    print(f"{'':<22}  tokens/s    MFU  peak GB  first step  loader   TFLOP/s    loss  ratio")
    for name, result in results.items():
        if "error" in result:
            print(f"{name:<22}  failed: {result['error']}")
            continue
        text = f"{name:<22}{result['tokens_per_second']:>10,.1f}{result['mfu']:>7.1%}"
        text += f"{result['peak_bytes'] / 1e9:>9.2f}{result['first_step_seconds']:>10.1f} s"
        text += f"{result['loader']:>8.2%}{(result['hardware_flops'] or 0) / 1e12:>10.3f}"
        text += f"{result['loss']:>8.3f}"
        if "ratio" in result:
            text += "{ratio:>7.2f} ({lowest:.2f} to {highest:.2f})".format(**result)
        print(text)
    print(f"roof: {flops / 1e12:.3f} TFLOP/s, {precision}")


def parameters(task: Task) -> int:
    return count(Configuration(**task.shape, sequence_length=task.sequence_length))


if __name__ == "__main__":
    command(lambda: auto_cli(main, as_positional=False))
