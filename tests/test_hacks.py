"""What a reader changes in model.py, and nowhere else, trains and evaluates in every engine."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, records, refused
from helpers import begin, changed, command, end, equal_records
from torch import nn

from model import Block

QUERIES = '        if config.positions == "rotary":\n'
ATTEND = "        y = ops.attention(q, k, v, is_causal=True, dropout_p=dropout)\n"
ATTENTION_END = "        self.proj = Linear(config.qkv_widths[0], config.width, bias=biased)\n"
RESIDUAL = "        x = x + self.attn(self.ln_1(x))\n        return x + self.mlp(self.ln_2(x))\n"
BLOCK_END = "        self.mlp = MLP(config)\n"
HEAD_INIT = "        self.norm = Norm(config)\n"
HEAD = "        return ops.logits(self.norm(x), table)\n"
FIELD = "    tied_head: bool = True\n"
README = {
    '            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_new" else '
    '"none")\n': "            x = F.relu(x).square()\n",
    RESIDUAL: "        return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))\n",
}
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


def same_in_every_engine(clone: Path, config, tmp_path: Path, *flags: object) -> list[dict]:
    """Train to step 2, and resume to step 3."""
    for engine, keys in ENGINES.items():
        out = ["--out_dir", tmp_path / engine, "--checkpoint_path", "latest", "--decay_steps", 2]
        for steps in (2, 3):
            more = [*keys, *flags, *out, "--num_steps", steps]
            command("train", config.path, *FLAGS, *more, root=clone)
        equal_records(tmp_path / "resident", tmp_path / engine)
    return records(tmp_path / "resident")


@pytest.mark.long
def test_the_readme_s_changes(config, tmp_path):
    readme = (ROOT / "README.md").read_text()
    assert all(before in readme and after in readme for before, after in README.items())
    clone = changed(tmp_path / "clone", README)
    seen = same_in_every_engine(clone, config, tmp_path, "--bias", "false")
    command("train", config.path, *FLAGS, "--bias", "false")
    assert seen[-1]["loss"] != pytest.approx(records(config.out)[-1]["loss"], rel=1e-4)
    assert seen[-1]["loss"] < seen[0]["loss"]


@pytest.mark.long
def test_all_hacks_at_once(config, tmp_path):
    command("train", config.path, *FLAGS)
    two_residuals = [hack for name, hack in HACKS.items() if name != "another residual"]
    clone = changed(tmp_path / "clone", *two_residuals)
    seen = same_in_every_engine(clone, config, tmp_path, "--logit_cap", 0.8)
    before = records(config.out)
    assert seen[0]["loss"] != pytest.approx(before[0]["loss"], rel=1e-3)
    assert seen[-1]["loss"] < seen[0]["loss"]
    # a checkpoint of the model as it was lacks what this one has
    old = config.out / "checkpoint_3.mdl"
    seen = end(begin("eval", config.path, "--checkpoint_path", old, root=clone))
    refused(seen, f"{old} lacks decoder.0.attn.gain, which model.py has")


@pytest.mark.long
@pytest.mark.parametrize("hack", HACKS)
def test_each_hack(config, tmp_path, hack):
    same_in_every_engine(changed(tmp_path / "clone", HACKS[hack]), config, tmp_path)


def test_a_scalar_parameter_is_refused(run, config, monkeypatch):
    """FSDP2 can't shard it, and safetensors' rows can't hold it."""

    class Scaled(Block):
        def __init__(self, config):
            super().__init__(config)
            self.scale = nn.Parameter(torch.tensor(0.5))

    monkeypatch.setattr("model.Block", Scaled)
    seen = run("train", config.path)
    refused(seen, "model.py: decoder.0.scale is a scalar; give it the shape (1,)")
