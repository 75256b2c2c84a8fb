"""What a reader changes in model.py, and nowhere else, trains and evaluates in every engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cloned, records, refused

QUERIES = '        if config.positions == "rotary":\n'
ATTEND = "        y = ops.attention(q, k, v, is_causal=True, dropout_p=dropout)\n"
ATTENTION_END = "        self.proj = Linear(config.qkv_widths[0], config.width, bias=biased)\n"
RESIDUAL = "        x = x + self.attn(self.ln_1(x))\n        return x + self.mlp(self.ln_2(x))\n"
BLOCK_END = "        self.mlp = MLP(config)\n"
HEAD_INIT = "        self.norm = Norm(config)\n"
HEAD = "        return ops.logits(self.norm(x), table)\n"
FIELD = "    tied_head: bool = True\n"
HACKS = {
    "a gain on queries": {
        ATTENTION_END: ATTENTION_END
        + "        self.gain = nn.Parameter(torch.full((config.head_size,), 1.5))\n",
        QUERIES: "        q = q * self.gain\n" + QUERIES,
    },
    "norms of queries and keys": {
        ATTENTION_END: ATTENTION_END
        + "        self.q_norm = nn.LayerNorm(config.head_size)\n"
        + "        self.k_norm = nn.RMSNorm(config.head_size)\n",
        QUERIES: "        q, k = self.q_norm(q), self.k_norm(k)\n" + QUERIES,
    },
    "ALiBi": {
        ATTEND: "        length = q.shape[2]\n"
        "        places = torch.arange(length, device=x.device, dtype=x.dtype)\n"
        "        slopes = 2.0 ** -torch.arange(1.0, config.heads + 1).to(x)\n"
        "        bias = (places[None] - places[:, None]).tril() * slopes[:, None, None]\n"
        "        future = torch.full((length, length), -torch.inf, device=x.device).triu(1)\n"
        "        y = ops.attention(q, k, v, bias + future.to(x.dtype), dropout_p=dropout)\n"
    },
    "another residual": {
        BLOCK_END: BLOCK_END + "        self.scale = nn.Parameter(torch.full((1,), 0.5))\n",
        RESIDUAL: "        x = x + self.scale * self.attn(self.ln_1(x))\n"
        "        return x + self.scale * self.mlp(self.ln_2(x))\n",
    },
    "a third norm": {
        BLOCK_END: BLOCK_END + "        self.ln_3 = Norm(config)\n",
        "        return x + self.mlp(self.ln_2(x))\n": "        return x + self.ln_3("
        "self.mlp(self.ln_2(x)))\n",
    },
    "a capped head with a bias": {
        FIELD: FIELD + "    logit_cap: float = 30.0\n",
        HEAD_INIT: HEAD_INIT
        + "        self.cap = nn.Parameter(torch.full((1,), config.logit_cap))\n"
        + "        self.shift = nn.Parameter(torch.zeros(config.vocab_size))\n",
        HEAD: "        y = ops.logits(self.norm(x), table)\n"
        "        return self.cap * torch.tanh(y / self.cap) + self.shift\n",
    },
}
ENGINES = {
    "resident": [],
    "streaming from RAM": ["--engine", "streaming", "--activation_checkpointing", "true"],
    "streaming from disk": ["--engine", "streaming", "--stream_to", "disk"],
    "sharded": ["--num_systems", "2", "--micro_batch_size", "20"],
}
# more positions in a micro-batch than have logits at one time
FLAGS = ["--batch_size", 40, "--micro_batch_size", 40, "--num_steps", 3, "--eval_steps", 3]


def changed(folder: Path, *hacks: dict[str, str]) -> Path:
    """A clone of the program, whose model.py has these changes."""
    clone = cloned(folder)
    source = (clone / "model.py").read_text()
    for hack in hacks:
        for before, after in hack.items():
            assert source.count(before) == 1, before
            source = source.replace(before, after)
    (clone / "model.py").write_text(source)
    return clone


def typed(clone: Path, name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, f"{name}.py", *map(str, arguments)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=clone, text=True, capture_output=True, env=variables)


def same_in_every_engine(clone: Path, config, tmp_path: Path, *flags: object) -> list[dict]:
    found = {}
    for engine, keys in ENGINES.items():
        out = tmp_path / engine.replace(" ", "_")
        done = typed(clone, "train", config.path, *FLAGS, *keys, *flags, "--out_dir", out)
        assert done.returncode == 0, done.stderr
        found[engine] = [record for record in records(out, "step")]
    for engine in ENGINES:
        for a, b in zip(found["resident"], found[engine], strict=True):
            for key in {"loss", "grad_norm", "val_loss"} & set(a):
                assert b[key] == pytest.approx(a[key], rel=1e-5), (engine, key, a["step"])
    return found["resident"]


@pytest.mark.long
def test_all_hacks_at_once(config, tmp_path):
    plain = typed(cloned(tmp_path / "plain"), "train", config.path, *FLAGS)
    assert plain.returncode == 0, plain.stderr
    two_residuals = [hack for name, hack in HACKS.items() if name != "another residual"]
    clone = changed(tmp_path / "clone", *two_residuals)
    seen = same_in_every_engine(clone, config, tmp_path, "--logit_cap", 0.8)
    before = records(config.out)
    assert seen[0]["loss"] != pytest.approx(before[0]["loss"], rel=1e-3)
    losses = [record["loss"] for record in seen if "loss" in record]
    assert losses[-1] < losses[0]
    # a checkpoint of the model as it was lacks what this one has
    old = config.out / "checkpoint_3.mdl"
    done = typed(clone, "eval", config.path, "--checkpoint_path", old)
    refused(done, f"{old} lacks decoder.0.attn.gain, which model.py has")


@pytest.mark.long
@pytest.mark.parametrize("hack", HACKS)
def test_each_hack(config, tmp_path, hack):
    same_in_every_engine(changed(tmp_path / "clone", HACKS[hack]), config, tmp_path)


def test_a_scalar_parameter_is_refused(config, tmp_path):
    """FSDP2 can't shard it, and safetensors' rows can't hold it."""
    hack = {BLOCK_END: BLOCK_END + "        self.scale = nn.Parameter(torch.tensor(0.5))\n"}
    done = typed(changed(tmp_path / "clone", hack), "train", config.path)
    refused(done, "model.py: decoder.0.scale is a scalar; give it the shape (1,)")
