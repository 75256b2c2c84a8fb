"""The planner: its arithmetic by hand, its command, and its memory beside what runs take."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, records, refused

import model
from configuration import Configuration
from model import Block
from planner.costs import Plan, make_plan, moved_bytes, step_flops
from planner.machine import DEVICES, Machine, known_device
from planner.measure import block, sizes
from planner.search import closest, engine_plans

GPT2 = {"width": 768, "depth": 10, "heads": 12, "precision": "bf16", "batch_size": 16}
BLOCK, OUTSIDE = 7_087_872, 40_171_776  # parameters of 111m: a block, and all but the blocks


def gpu(**changes) -> Machine:
    sizes = {"device": 76 * 10**9, "host": 2 * 10**12, "disk": 8 * 10**12, "program": 3 * 10**9}
    rates = {"matmul": 1e15, "bandwidth": 3e12, "link": 5e10, "read": 6e9, "write": 4e9}
    rates |= {"network": 4.5e11, "fabric": 5e10, "processes": 1}
    return Machine(**{"name": "a GPU", "backend": "GPU", **sizes, **rates, **changes})


def planned(machine: Machine, **keys) -> Plan:
    plans = engine_plans(Configuration(**GPT2 | {"backend": machine.backend} | keys), machine)
    return closest(plans)


def test_sizes_by_hand():
    """width 768: 12·768² in matrices, 9·768 in their biases, 4·768 in two norms; outside them the
    50,257 tokens, 2,048 positions and the last norm."""
    assert BLOCK == 12 * 768**2 + 13 * 768
    assert OUTSIDE == (50257 + 2048 + 2) * 768
    found = sizes(Configuration(**GPT2))
    assert (found.outside, found.block, found.blocks) == (OUTSIDE, BLOCK, 10 * BLOCK)
    assert found.matrix == 4 * 768**2


def moved(config: Configuration, staying: int = 0) -> tuple[int, int]:
    forward, backward = moved_bytes(config, staying)
    return forward[0] + backward[0], forward[1] + backward[1]


def test_bytes_that_move_by_hand():
    """20 in and 16 out a parameter, but that the last block comes once and the embedding thrice."""
    config = Configuration(**GPT2, engine="streaming", micro_batch_size=16, stream_batch_size=16)
    blocks, embedding = 10 * BLOCK, OUTSIDE - 2 * 768
    weights = 4 * (embedding + blocks + OUTSIDE + blocks - BLOCK + embedding)
    gradients = 4 * (embedding + blocks + OUTSIDE)
    inward = 12 * (blocks + OUTSIDE) + weights
    inward += 4 * embedding  # the first of the embedding's two gradients comes back
    outward = 12 * (blocks + OUTSIDE) + gradients
    assert moved(config) == (inward, outward)
    half = replace(config, micro_batch_size=8, stream_batch_size=8)
    assert moved(half) == (inward + weights + gradients, outward + gradients)
    stay = 4 * BLOCK
    assert moved(config, 4) == (inward - 20 * stay, outward - 16 * stay)
    again = inward + weights + gradients - 32 * stay
    assert moved(half, 4) == (again, outward + gradients - 20 * stay)
    untied = replace(config, tied_head=False)
    head = 50257 * 768 + 2 * 768
    total = embedding + blocks + head
    weights = 4 * (embedding + blocks + head + blocks - BLOCK + embedding)
    assert moved(untied) == (12 * total + weights, 16 * total)


def test_flops_by_hand():
    """2 a weight of the matrices and token forward, and attention's own; recomputing leaves out the
    last matrix, 4·768²."""
    config = Configuration(**GPT2, engine="resident")
    tokens = 16 * 2048
    attention = 2 * 2048 * 768 * 10
    blocks = 2 * 10 * 12 * 768**2 + attention
    assert step_flops(config) == 3 * tokens * (blocks + 2 * OUTSIDE)
    again = replace(config, engine="streaming", activation_checkpointing=True)
    last = 2 * 10 * 4 * 768**2
    assert step_flops(again) == tokens * (4 * blocks - last + 6 * OUTSIDE)


def test_engines_follow_memory():
    """As memory shrinks: resident, then kept activations, then recomputed ones, then passes."""
    middle = {"width": 2048, "depth": 24, "heads": 16}
    assert planned(gpu(), **middle).config.engine == "resident"
    small = planned(gpu(device=12 * 10**9), **middle).config
    assert (small.engine, small.stream_to) == ("streaming", "ram")
    tiers = {"device": 12 * 10**9, "host": 8 * 10**9}
    assert planned(gpu(**tiers), **middle).config.stream_to == "disk"
    assert planned(gpu(**tiers, disk=10**10), **middle).missing
    big = {"width": 4096, "depth": 32, "heads": 32, "batch_size": 64}
    roomy, tight = (planned(gpu(device=d * 10**9), **big).config for d in (76, 24))
    assert roomy.activation_checkpointing and tight.activation_checkpointing
    assert tight.stream_batch_size < 64 or tight.activation_location == "host"


def test_as_many_blocks_stay_on_the_device_as_fit(run):
    """16 bytes a parameter in what a step leaves, less a tenth of what it needs."""
    keys = {"width": 4096, "depth": 32, "heads": 32, "batch_size": 16}
    block = 12 * 4096**2 + 13 * 4096
    for memory, fewest, most in ((22, 0, 2), (40, 4, 12), (76, 12, 24), (130, 32, 32)):
        machine = gpu(device=memory * 10**9)
        plan = planned(machine, **keys, engine="streaming")
        without = make_plan(plan.config, machine, blocks=0)
        stay, needed = plan.blocks_on_device, without.bytes["device"]
        assert fewest <= stay <= most
        room = max(needed, machine.device - 0.1 * needed)
        assert plan.bytes["device"] == needed + 16 * block * stay <= room
        assert plan.bytes["host"] == without.bytes["host"] - 16 * block * stay
        assert stay == 32 or plan.bytes["device"] + 16 * block > room - 1
        assert plan.seconds < without.seconds or stay == 0
    cpu = replace(machine, backend="CPU")
    assert planned(cpu, **keys, engine="streaming").blocks_on_device == 0
    flags = ["--device", "h100", "--host_memory", "80GB", "--batch_size", 16]
    seen = run("plan", ROOT / "configs/6p7b.yaml", *flags)
    assert seen.status == 0 and " of 32 blocks stay on the device, which saves " in seen.out


def test_a_cpu_has_one_place_for_the_inputs_of_blocks():
    keys = {"engine": "streaming", "activation_checkpointing": True, "batch_size": 64}
    cpu = replace(gpu(), backend="CPU")
    places = ("host", "device")
    host, device = (planned(cpu, **keys, activation_location=place).bytes for place in places)
    assert host == device


def test_what_is_asked_for_is_kept(run, config):
    """Without recomputation there is nothing to keep in host memory, and that is no error."""
    keys = RECOMPUTED | {"micro_batch_size": 2}
    found = planned(gpu(), **keys, stream_batch_size=6).config
    assert {key: getattr(found, key) for key in keys} == keys
    assert (found.stream_batch_size, found.activation_location) == (6, "device")
    flags = ["--engine", "streaming", "--activation_checkpointing", "false"]
    assert run("plan", config.path, *flags, "--activation_location", "host").status == 0


@pytest.mark.parametrize(
    ("size", "more", "engine", "tier"),
    [
        ("70b", ["--host_memory", "2TB"], "streaming", "host"),
        ("175b", ["--host_memory", "2TB", "--disk", "8TB"], "streaming", "disk"),
        ("1p3b", [], "resident", "device"),
    ],
)
def test_plans_for_an_h100(run, size, more, engine, tier):
    """70B fits in 2 TB of host memory, 175B on a disk: 16 bytes a parameter."""
    seen = run("plan", ROOT / f"configs/{size}.yaml", "--device", "h100", *more, "--json")
    assert seen.status == 0, seen.err
    told = json.loads(seen.out)
    assert told["fits"] and told["engine"] == engine
    assert told["bytes"]["device"] < 80e9
    assert told["bytes"][tier] >= 16 * told["parameters"]
    if size == "70b":  # with its 664 saves
        steps = told["seconds_per_step"] * 663425
        assert steps < told["days"] * 86400 < 1.01 * steps
    # 6 · parameters · tokens at 989 TFLOP/s is what nothing can beat
    assert told["seconds_per_step"] > told["flops_per_step"] / 989e12


NAMES = {  # as the driver of a GPU spells it, and ours
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA B200": "b200",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": None,
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA RTX 6000 Ada Generation": None,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtx pro 6000",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": None,
    "NVIDIA GeForce RTX 5090": "rtx 5090",
    "NVIDIA GeForce RTX 5090 Laptop GPU": None,
}


def test_a_gpu_is_known_by_its_name():
    for name, key in NAMES.items():
        assert known_device(name) is DEVICES.get(key), name


TYPED = ["b300", "gh200", "rtx-pro-6000", "rtx5090", "a6000", "a10", "RTX-4090", "rtx_4090"]


@pytest.mark.parametrize("device", [*TYPED, "rtx4090", "H100-PCIe"])
def test_plans_for_other_gpus(run, device):
    """By a name however it is typed."""
    seen = run("plan", ROOT / "configs/111m.yaml", "--device", device)
    assert seen.status == 0, seen.err
    assert "host memory: " in seen.out and "--host_memory sets it" in seen.out


def test_the_table(run):
    more = ["--device", "h100", "--host_memory", "2TB"]
    seen = run("plan", ROOT / "configs/70b.yaml", *more)
    assert seen.status == 0, seen.err
    for words in (
        *("64,861,528,064 parameters", "3,014,656 tokens", "resident", "missing: 1.14 TB"),
        *("streaming engine on GPU", "compute is the limit", "663,425 steps", "h100 (bf16)"),
    ):
        assert words in seen.out


def test_what_does_not_fit(run):
    more = ["--device", "h100", "--host_memory", "256GB", "--disk", "500GB"]
    seen = run("plan", ROOT / "configs/70b.yaml", *more)
    assert seen.status == 2, seen.err
    assert "does not fit" in seen.out and "986.24 GB of disk, there are 500.00 GB" in seen.out
    assert "use --num_systems 24 or a larger disk (--stream_dir)\n" in seen.out
    told = run("plan", ROOT / "configs/70b.yaml", *more, "--json")
    assert told.status == 2 and not json.loads(told.out)["fits"]
    seen = run("plan", ROOT / "configs/70b.yaml", "--device", "h100", "--batch_size", 2**20)
    assert seen.status in (0, 2)  # the largest batch


def test_a_limit_with_a_device(run):
    flags = ["--device", "h100", "--host_memory", "64GB", "--json"]
    engines = [
        json.loads(run("plan", ROOT / "configs/1p3b.yaml", *flags, *more).out)["engine"]
        for more in ([], ["--memory_limit", "16GB"])
    ]
    assert engines == ["resident", "streaming"]


def test_a_disk_that_cannot_be_measured_is_not_remembered(run, config, monkeypatch, tmp_path):
    """Full for a moment: the next command measures it again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def full(*arguments: object, **keys: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("planner.machine.measure_disk", full)
        assert run("plan", config.path).status == 0
    kept = tmp_path / "cache/gigagpt/rates.json"
    assert not kept.exists()
    assert run("plan", config.path, "--stream_dir", tmp_path).status == 0
    assert {"matmul", "read"} <= json.loads(kept.read_text()).popitem()[1].keys()
    monkeypatch.setattr("planner.machine.tempfile.TemporaryFile", full)
    seen = run("train", config.path, "--stream_dir", tmp_path)
    refused(seen, "can't be written to (No space left on device); use another")


@pytest.mark.parametrize("damaged", ["", "[]", "3", '{"hour": "x"}', "[" * 10**5])
def test_damaged_rates_are_measured_again(run, config, monkeypatch, tmp_path, damaged):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "gigagpt/rates.json"
    kept.parent.mkdir()
    kept.write_text(damaged)
    assert run("plan", config.path).status == 0
    assert {"matmul", "read"} <= json.loads(kept.read_text()).popitem()[1].keys()


@pytest.mark.parametrize(
    ("first", "then", "shown"),
    [
        (["--stream_batch_size=2"], ["--stream_batch_size=2", "--micro_batch_size=8"], ""),
        (["--stream_batch_size=2"], ["--micro_batch_size=4"], ""),
        (["--micro_batch_size=4"], ["--stream_batch_size=2"], ""),
        (
            ["--micro_batch_size=4"],
            ["--micro_batch_size=1", "--stream_batch_size=2"],
            "4 micro-batches of 1 × 32",
        ),
    ],
)
def test_a_resumed_run_is_cut_in_another_way(run, config, first, then, shown):
    """What it is asked for comes before what it had; a micro-batch may be above the batch."""
    streamed = ["train", config.path, "--engine", "streaming", "--stream_to", "ram"]
    assert run(*streamed, *first, "--num_steps", 3).status == 0
    seen = run(*streamed, *then, "--checkpoint_path", "latest")
    assert seen.status == 0, seen.err
    assert shown in seen.out and ("in 2 passes" in seen.out) == ("stream_batch" in str(then))


class WideMLP(model.MLP):
    def __init__(self, config):
        super().__init__(config)
        self.fc = torch.nn.Linear(config.width, 7 * config.width)
        self.proj = torch.nn.Linear(7 * config.width, config.width)


def parallel(self, x: torch.Tensor) -> torch.Tensor:
    normed = self.ln_1(x)
    return x + self.attn(normed) + self.mlp(normed)


CHANGES = {
    "as it is": lambda patch: None,
    "a wider MLP": lambda patch: patch.setattr(model, "MLP", WideMLP),
    "parallel branches": lambda patch: patch.setattr(Block, "forward", parallel),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_block_keeps(monkeypatch, change, dropout, precision):
    """The planner's measurement on fake tensors beside a real block, of a changed model too."""
    CHANGES[change](monkeypatch)
    width = 64 + 8 * list(CHANGES).index(change)  # a model that was not measured before
    config = Configuration(
        width=width, depth=1, heads=8, dropout=dropout, precision=precision, backend="CPU",
        sequence_length=512, max_position_embeddings=512,
    )  # fmt: skip
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    real, storages = Block(config).to(dtype), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real(torch.randn(1, 512, width, dtype=dtype, requires_grad=True))
    kept = sum(size for size, _ in storages.values())
    assert block(config).kept_bytes == pytest.approx(kept, rel=0.03)


def test_evaluations_and_saves_take_time(run, config):
    flags = ["--eval_steps", 1, "--batch_size", 1]
    seen = run("plan", config.path, *flags, "--warmup_steps", 9)
    assert "evaluations take about" not in seen.err  # a second, and training less
    assert "warning: warmup_steps 9 is above num_steps 6: the learning rate" in seen.err
    seen = run("plan", config.path, *flags, "--num_steps", 10**6)
    assert "warning: evaluations take about" in seen.err
    assert "lower --eval_batches or raise" in seen.err
    seen = run("train", config.path, "--warmup_steps", 9, "--num_steps", 3)
    assert "warning: warmup_steps 9 is above num_steps 3" in seen.err
    out = config.out / "peak"
    seen = run("train", config.path, "--warmup_steps", 3, "--num_steps", 3, "--out_dir", out)
    assert records(out)[-1]["learning_rate"] == config.values["learning_rate"]
    assert "warmup_steps" not in seen.err
    seen = run("plan", config.path, "--dataset", "data/nowhere")
    assert "without evaluations: data/nowhere is not prepared" in seen.out


def test_this_machine(run, config):
    seen = run("plan", config.path, "--json")
    told = json.loads(seen.out)
    assert told["fits"] and told["engine"] == "resident"
    assert {"parameters", "micro_batch_size", "seconds_per_step", "days"} <= told.keys()
    assert set(told["bytes"]) == {"device", "host", "disk"}


def test_training_prints_the_plan(run, config):
    seen = run("train", config.path, "--num_steps", 3, "--engine", "streaming")
    lines = seen.out.splitlines()
    assert "streaming engine on CPU, fp32" in lines[0]
    assert "reads" in lines[1] and "writes" in lines[1]
    assert "for 3 steps" in lines[2]


def test_bad_arguments(run, config):
    refused(run("plan", config.path, "--device", "abacus"), "device: abacus is not known; known")
    refused(run("plan", config.path, "--host_memory", "much"), "host_memory: 'much' is not a size")
    refused(run("plan", config.path, "--devise", "h100"), "--devise is not a known key; did you")


RECOMPUTED = {"engine": "streaming", "stream_to": "disk", "activation_checkpointing": True}


@pytest.mark.long
@pytest.mark.parametrize(
    "keys", [{"engine": "resident"}, RECOMPUTED], ids=["resident", "streaming"]
)
def test_memory_is_what_was_planned(tmp_path, keys):
    """Within 15%, in processes of their own; bench/streaming.py plan shows larger models."""
    tries = 3 if keys["engine"] == "resident" else 1  # whose heap may be lucky, and smaller
    keys = keys | {"precision": "fp32", "width": 512, "depth": 4, "heads": 8}
    keys |= {"sequence_length": 1024, "batch_size": 2}
    command = [sys.executable, "bench/streaming.py", "one", "--keys", json.dumps(keys)]
    measured = []
    for _ in range(tries):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        measured.append(told["measured"]["bytes"])
    assert max(measured) == pytest.approx(told["planned"]["bytes"], rel=0.15)
