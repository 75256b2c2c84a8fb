"""Tokens a second of our training step and of Hugging Face's GPT-2, in turns on the same machine.

python bench/step.py [--width 768 --depth 4 --tokens 2048 --rounds 3 --precision auto]. All sides
have the same shape, tokens and precision, AdamW and clipping; theirs are eager and compiled, in
bf16 under autocast. The best of the rounds counts, as machines are noisy. The roof is the rate of
a matrix product, measured in the same minute.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import machine
import plan
from configuration import Configuration
from engines import open_engine
from export import hugging_face_config


def main(
    width: int = 768,
    depth: int = 4,
    tokens: int = 2048,
    rounds: int = 3,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    config = Configuration(
        width=width,
        depth=depth,
        heads=width // 64,
        max_position_embeddings=1024,
        sequence_length=1024,
        batch_size=tokens // 1024,
        precision=precision,
    )
    config = plan.resolve(config, {}).config
    sides = {
        "gigaGPT": ours(config),
        "transformers": theirs(config),
        "transformers, compiled": theirs(config, compiled=True),
    }
    seconds = alternate(sides, rounds)
    roof = machine.peak_flops(config.backend, config.precision)
    result = {"precision": config.precision, "roof_gflops": roof / 1e9, "tokens": tokens}
    for name, taken in seconds.items():
        rate = tokens / min(taken)
        result[name] = {
            "tokens_per_second": rate,
            "mfu": rate * plan.flops_per_token(config) / roof,
            "spread": max(taken) / min(taken),
        }
        print(f"{name:>22}: {rate:8.1f} tokens/s, MFU {result[name]['mfu']:.1%}", file=sys.stderr)
    rates = {name: result[name]["tokens_per_second"] for name in sides}
    result["ratios"] = {name: rates["gigaGPT"] / rate for name, rate in rates.items()}
    print(json.dumps(result))


def alternate(sides: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds that each side took, in turns, after one more to warm up."""
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, step in sides.items():
            begin = time.perf_counter()
            step()
            if i > 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def batch(config: Configuration) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.RandomState(0).randint(
        0, config.vocab_size, (config.batch_size, config.sequence_length + 1)
    )
    return ids[:, :-1], ids[:, 1:]


def ours(config: Configuration):
    class Batches:
        def __init__(self, rank: int, world: int):
            self.rank, self.world = rank, world

        def __getitem__(self, step: int):
            return tuple(np.array_split(a, self.world)[self.rank] for a in batch(config))

    engine = open_engine(config)
    engine.initialize()
    steps = engine.run(Batches, 0, 10**9, lambda fraction: None)
    return lambda: next(steps)


def theirs(config: Configuration, compiled: bool = False):
    from transformers import GPT2LMHeadModel

    device = "cuda" if config.backend == "GPU" else "cpu"
    model = GPT2LMHeadModel(hugging_face_config(config)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model) if compiled else model
    cast = torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16")

    def step() -> None:
        ids, _ = batch(config)
        ids = torch.from_numpy(ids).to(device)
        with cast:
            loss = run(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
