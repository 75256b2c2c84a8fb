"""The streaming engine's GPU branch under a race detector (tests/races.py), on a CPU."""

import ast
import os
from pathlib import Path

import pytest
import torch
from helpers import (
    GPU_CASES,
    batches_of,
    engine_config,
    equal_runs,
    eval_data,
    quiet,
    streaming_config,
    train,
)
from races import ENGINES, Detector, Watch, watched

import loss
import ops
from engines import buffers, open_engine, store, streaming
from runtime.samples import next_logits

WAITS = {"wait_event", "synchronize", "wait_stream", "record_stream"}
SMALL = {"micro_batch_size": 1, "stream_batch_size": 1, "depth": 1}
TWO = {"micro_batch_size": 1, "stream_batch_size": 2}
CASES = [
    *GPU_CASES,
    {"stream_to": "ram", **TWO, "depth": 1},
    {"stream_to": "disk", **SMALL},
    {"stream_to": "ram", **TWO, "activation_location": "host"},
    {"stream_to": "disk", "activation_checkpointing": True, "blocks_on_device": 4},
    {"stream_to": "disk", **TWO, "activation_location": "host", "blocks_on_device": 1},
    {"stream_to": "ram", **SMALL, "blocks_on_device": 1},
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several chunks a layer and of logits, as real models have; and what a GPU computes."""
    monkeypatch.setattr(store, "CHUNK", {"ram": 1024, "disk": 1024})
    monkeypatch.setattr(loss, "CHUNK", {"cpu": 16})
    monkeypatch.setattr(ops, "_is_on_cpu", lambda x: False)


def run(detector: Detector, keys: dict, dataset: Path, out: Path, steps: int = 3) -> list:
    """Steps, an evaluation, texts and what is saved, then more steps."""
    with pytest.MonkeyPatch.context() as patch, Watch(detector):
        watched(detector, patch)
        keys = {"depth": 4, "precision": "bf16", **keys}
        staying = keys.pop("blocks_on_device", 0)
        config = streaming_config(out, **keys)
        engine = open_engine(config, blocks_on_device=staying)
        engine.initialize()
        batches = batches_of(config, dataset)
        try:
            stats = list(engine.run(batches, 0, steps - 1, quiet))
            engine.evaluate(eval_data(dataset, config.vocab_size, 32, 4), 4)
            next_logits(engine, [torch.arange(5), torch.arange(9)])
            for _ in engine.state():
                pass
            stats += engine.run(batches, steps - 1, steps, quiet)
            for fetch in engine.fetches.values():  # closing cancels what has not begun
                fetch.result()
        finally:
            engine.close()
        del engine
    return stats


PART = (0, 3, 5)  # of the cases, for every run of the tests


@pytest.mark.parametrize(
    "keys",
    [pytest.param(c, marks=[] if i in PART else pytest.mark.long) for i, c in enumerate(CASES)],
)
def test_no_race(dataset, tmp_path, keys):
    detector = Detector()
    got = run(detector, keys, dataset, tmp_path)
    print(f"\n{detector.count:,} accesses, {len(detector.races)} races")
    assert detector.count > 1000 and not detector.races, "\n".join(map(str, detector.races[:4]))
    same = {"depth": 4, "precision": "bf16"}
    same |= {key: keys[key] for key in ("depth", "micro_batch_size") if key in keys}
    equal_runs(train(engine_config(**same), dataset, 3)[0], got, 5e-3, 3e-2)


@pytest.mark.parametrize("location", [pytest.param("device", marks=pytest.mark.long), "host"])
def test_compiled_blocks_whose_memory_comes_and_goes(dataset, tmp_path, monkeypatch, location):
    """The same branch, compiled."""
    for module in (buffers, streaming):
        monkeypatch.setattr(module, "is_separate", lambda device: True)
    same = {"depth": 4, "precision": "bf16", "compile": True, "micro_batch_size": 1}
    config = streaming_config(tmp_path, **same, activation_location=location)
    got, engine = train(config, dataset, 5)
    engine.close()
    equal_runs(train(engine_config(**same), dataset, 5)[0], got, 5e-3, 3e-2)


def sites() -> set[tuple[str, int]]:
    """Where the engine waits."""
    found = set()
    for name in ("streaming.py", "buffers.py", "store.py"):
        tree = ast.parse(Path(ENGINES, name).read_text())
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        found |= {(name, c.lineno) for c in calls if getattr(c.func, "attr", "") in WAITS}
    return found


@pytest.mark.long
@pytest.mark.skipif(os.environ.get("MUTATIONS") == "0", reason="MUTATIONS=0")
@pytest.mark.parametrize("site", sorted(sites()), ids=str)
def test_each_wait_is_needed(dataset, tmp_path, site):
    """Without it there is a race in some case."""
    for keys in CASES:
        detector = Detector(site)
        run(detector, keys, dataset, tmp_path)
        if detector.races:
            assert site in detector.waits
            return
    pytest.fail(f"{site[0]}:{site[1]} is never missed")


def racy_wait(self, layer: str) -> None:
    """As it was once: what is waited for is taken from the list before the wait."""
    with self.mutex:
        pending = self.written.pop(layer, [])
    for one in pending:
        self._wait_one(one)


@pytest.mark.long
def test_a_race_of_the_host_is_found(dataset, tmp_path, monkeypatch):
    """Threads of the store that are delayed at random."""
    monkeypatch.setattr(store, "CHUNK", {"ram": 2**20, "disk": 2**20})  # a layer in one piece

    def races(seed: int) -> list:
        detector = Detector(delays=0.002, seed=seed)
        run(detector, {"stream_to": "disk", **SMALL}, dataset, tmp_path)
        return detector.races

    assert not any(map(races, range(5)))
    monkeypatch.setattr(store.Store, "wait", racy_wait)
    assert any(map(races, range(50)))
