"""eval.py, sample.py, export.py and init_from, on checkpoints that train.py wrote."""

import hashlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, VOCABULARY, records, refused, write_dataset
from safetensors.torch import load_file, save_file

from common.files import read_sealed, write_sealed
from model import GPT, MLP, Block, GPTConfig, Head, Norm
from runtime.samples import Sampling, draw
from weights.checkpoint import MODEL_CODE, Checkpoint, model_code
from weights.huggingface import INDEX, load_model, load_tokenizer

SHAPES = {
    "small": {"width": 32, "depth": 2, "heads": 2},
    "odd": {"width": 48, "depth": 3, "heads": 4, "activation": "gelu_new"},
}


@pytest.fixture(params=SHAPES)
def trained(request, run, config) -> Path:
    """A checkpoint whose biases and norms are not what they were at the start."""
    shape = [part for k, v in SHAPES[request.param].items() for part in (f"--{k}", v)]
    seen = run("train", config.path, *shape, "--num_steps", 3, "--warmup_steps", 0)
    assert seen.status == 0, seen.err
    return config.out / "checkpoint_3.mdl"


def our_logits(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    shape = {k: getattr(checkpoint.config, k) for k in GPTConfig.__dataclass_fields__}
    model = GPT(GPTConfig(**shape)).eval()
    model.load_state_dict({name: checkpoint.read(name) for name in model.state_dict()})
    with torch.no_grad():
        return model(ids)


def test_exported_model_is_the_same(run, trained, tmp_path):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    out = tmp_path / "exported"
    assert run("export", "--checkpoint_path", trained, "--out", out).status == 0
    theirs, report = GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    checkpoint = Checkpoint(trained)
    assert theirs.config.activation_function == checkpoint.config.activation
    ids = torch.randint(VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(0))
    expected = our_logits(checkpoint, ids)
    assert expected.abs().max() > 0.1
    assert (theirs.eval()(ids).logits - expected).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("a b\ncd")["input_ids"]) == "a b\ncd"
    refused(run("export", "--checkpoint_path", trained, "--out", out), "is not an empty folder")


def test_the_files_of_an_export(run, trained, tmp_path, monkeypatch):
    """As transformers writes them: one, or several with their index, in the same order."""
    for name, largest in (("one", 10**9), ("several", 40_000)):
        monkeypatch.setattr("weights.huggingface.LARGEST_FILE", largest)
        seen = run("export", "--checkpoint_path", trained, "--out", tmp_path / name)
        assert seen.status == 0, seen.err
    (one,) = (tmp_path / "one").glob("*.safetensors")
    assert one.name == "model.safetensors" and not (tmp_path / "one" / INDEX).exists()
    several = sorted((tmp_path / "several").glob("*.safetensors"))
    assert several[0].name == f"model-00001-of-{len(several):05}.safetensors" and len(several) > 2
    assert all(file.stat().st_size < 45_000 for file in several)
    whole = load_file(one)
    assert "lm_head.weight" not in whole
    index = json.loads((tmp_path / "several" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    parts = {name: file.name for file in several for name in load_file(file)}
    assert index["weight_map"] == parts
    for file in several:
        assert all(torch.equal(whole[name], t) for name, t in load_file(file).items())
    keys = json.loads((tmp_path / "one/tokenizer_config.json").read_text())
    assert keys["tokenizer_class"] == "PreTrainedTokenizerFast" and "bos_token" not in keys


def test_evaluating_a_released_model(run, trained, config, tmp_path):
    """As its checkpoint does, and as the training from it says before its first step."""
    out, tuned = tmp_path / "exported", tmp_path / "tuned"
    run("export", "--checkpoint_path", trained, "--out", out)
    shape = [part for key in ("width", "depth", "heads") for part in (f"--{key}", 8)]
    results = []
    for flags in (["--init_from", out, *shape], ["--checkpoint_path", trained, "--init_from", out]):
        seen = run("eval", config.path, "--json", *flags)
        assert seen.status == 0, seen.err
        results.append(json.loads(seen.out))
    assert results[0]["step"] == 0
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)
    flags = ["--init_from", out, "--out_dir", tuned, "--num_steps", 3, "--eval_on_start", "true"]
    assert "step 0/3 | val_loss" in run("train", config.path, *flags).out
    first, last = records(tuned, "val_loss")
    assert (first["step"], last["step"]) == (0, 3)
    assert first["val_loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
    seen = run("plan", config.path, "--init_from", out)
    weights = Checkpoint(trained).weights
    count = sum(math.prod(Checkpoint(trained).tensors[name]["shape"]) for name in weights)
    assert seen.status == 0 and f"{count:,} parameters" in seen.out, seen.err
    (out / "config.json").unlink()
    (out / "model.safetensors").rename(out / "pytorch_model.bin")
    for words in (["eval", config.path], ["plan", config.path], ["sample", "--prompt", "a"]):
        refused(run(*words, "--init_from", out), f"init_from: {out}: ")


def test_there_and_back(run, trained, config, tmp_path):
    """init_from an exported model evaluates to the same loss: both ways are right."""
    out, back = tmp_path / "exported", tmp_path / "back"
    run("export", "--checkpoint_path", trained, "--out", out)
    seen = run(
        *("train", config.path, "--init_from", out, "--out_dir", back, "--num_steps", 1),
        *("--learning_rate", 1e-30, "--warmup_steps", 0, "--weight_decay", 0),
    )
    assert seen.status == 0, seen.err
    assert f"starting from the weights of {out}" in seen.out
    a, b = (Checkpoint(path) for path in (trained, back / "checkpoint_1.mdl"))
    for key in ("width", "depth", "heads", "activation"):
        assert getattr(a.config, key) == getattr(b.config, key)
    for name in a.tensors:
        if not name.startswith("exp_avg"):
            assert torch.equal(a.read(name), b.read(name)), name


def test_init_from_weights_of_transformers(run, config, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=VOCABULARY, n_positions=40, n_embd=32, n_layer=2, n_head=4)
    theirs = GPT2LMHeadModel(shape).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "gpt2")
    seen = run(
        *("train", config.path, "--init_from", tmp_path / "gpt2", "--num_steps", 1),
        *("--learning_rate", 1e-30, "--weight_decay", 0),
    )
    assert seen.status == 0, seen.err
    checkpoint = Checkpoint(config.out / "checkpoint_1.mdl")
    assert checkpoint.config.activation == "gelu_new"
    assert checkpoint.config.max_position_embeddings == 40
    ids = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    assert (our_logits(checkpoint, ids) - theirs(ids).logits).abs().max() < 1e-4


def test_what_model_cannot_compute(run, config, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig

    GPTNeoXConfig().save_pretrained(tmp_path / "neox")
    seen = run("train", config.path, "--init_from", tmp_path / "neox")
    refused(seen, "its model_type is 'gpt_neox'; known are gpt2, llama, mistral, qwen2, qwen3")
    shape = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    shape.scale_attn_weights = False
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "unscaled")
    seen = run("train", config.path, "--init_from", tmp_path / "unscaled")
    refused(seen, "its scale_attn_weights is False, which model.py can't compute")


@pytest.mark.parametrize("key", ["bias", "tied_head"])
def test_export_without(run, config, tmp_path, key):
    from transformers import GPT2LMHeadModel

    run("train", config.path, "--num_steps", 3, f"--{key}", "false")
    checkpoint = Checkpoint(config.out / "checkpoint_3.mdl")
    run("export", "--checkpoint_path", checkpoint.path, "--out", tmp_path / "exported")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "exported").eval()
    ids = torch.arange(20)[None]
    assert (theirs(ids).logits - our_logits(checkpoint, ids)).abs().max() < 1e-4


def test_eval(run, config):
    run("train", config.path)
    checkpoint = config.out / "checkpoint_6.mdl"
    seen = run("eval", config.path, "--checkpoint_path", checkpoint, "--json")
    result = json.loads(seen.out)
    meta = json.loads((Path(config.values["dataset"]) / "meta.json").read_text())
    assert result["tokens"] == meta["tokens"]["val"] - 1
    assert result["loss"] == pytest.approx(
        records(config.out, "val_loss")[-1]["val_loss"], rel=1e-6
    )
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2))  # 1 byte a token
    seen = run("eval", config.path, "--checkpoint_path", "latest")
    assert f"loss {result['loss']:.6g} | perplexity" in seen.out


def test_eval_refusals(run, config, tmp_path):
    refused(run("eval", config.path), "--checkpoint_path is required")
    refused(run("eval", config.path, "--checkpoint_path", tmp_path), "is not a checkpoint")
    run("train", config.path, "--num_steps", 3)
    flags = ["--checkpoint_path", "latest", "--dataset", tmp_path / "nothing"]
    refused(run("eval", config.path, *flags), "is missing: prepare the dataset")


def test_sample(run, config):
    run("train", config.path, "--num_steps", 3)
    flags = ["--checkpoint_path", config.out / "checkpoint_3.mdl", "--prompt", "ab cd"]
    first = run("sample", *flags, "--max_new_tokens", 100)  # longer than the model's 32 positions
    assert first.status == 0, first.err
    assert first.out.startswith("ab cd")
    assert len(first.out) == len("ab cd") + 100 + 1
    assert run("sample", *flags, "--max_new_tokens", 100).out == first.out
    assert run("sample", *flags, "--max_new_tokens", 100, "--seed", 1).out != first.out
    likeliest = [run("sample", *flags, "--temperature", 0, "--seed", s).out for s in (0, 1)]
    assert likeliest[0] == likeliest[1]
    several = run("sample", *flags, "--num_samples", 3, "--max_new_tokens", 5)
    assert several.out.count("ab cd") == 3


def test_sample_follows_the_model(run, config):
    """The likeliest next tokens by our own model are what transformers' generate writes."""
    run("train", config.path, "--num_steps", 6, "--activation", "gelu_new")
    checkpoint = Checkpoint(config.out / "checkpoint_6.mdl")
    flags = ["--checkpoint_path", checkpoint.path, "--prompt", "ab", "--temperature", 0]
    written = run("sample", *flags, "--max_new_tokens", 20).out[:-1]
    ids = torch.arange(20)[None]
    model = load_model(checkpoint, checkpoint.check_model(), "cpu", torch.float32)
    assert (model(ids).logits - our_logits(checkpoint, ids)).abs().max() < 1e-4
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    for _ in range(20):
        ids = torch.cat([ids, our_logits(checkpoint, ids)[:, -1:].argmax(-1)], 1)
    assert written == tokenizer.decode(ids[0])


def test_sample_reads_prompts_from_a_pipe(run, config, monkeypatch):
    """Each line is one, but for empty ones; stdout has the texts alone."""
    run("train", config.path, "--num_steps", 3)
    flags = ["--checkpoint_path", config.out / "checkpoint_3.mdl", "--max_new_tokens", 5]
    expected = [run("sample", *flags, "--prompt", prompt).out for prompt in ("abc", "xy")]
    monkeypatch.setattr("sys.stdin", io.StringIO("\nabc\n\nZ\n"))
    seen = run("sample", *flags)
    assert (seen.status, seen.out) == (0, expected[0])
    assert "warning: the prompt 'Z' has a character that the vocabulary lacks" in seen.err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\nxy"))
    assert run("sample", *flags).out == expected[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    refused(run("sample", *flags), "stdin is not text in utf-8")


@pytest.mark.long
def test_sample_asks_for_prompts_on_a_terminal(run, config):
    """Up to an empty line; the question is not in stdout."""
    run("train", config.path, "--num_steps", 3)
    flags = ["--checkpoint_path", str(config.out / "checkpoint_3.mdl"), "--max_new_tokens", "5"]
    ours, terminal = os.openpty()
    os.write(ours, b"abc\nxy\n\nnot read\n")
    done = subprocess.run(
        [sys.executable, "sample.py", *flags], cwd=ROOT, stdin=terminal, capture_output=True
    )
    for descriptor in (ours, terminal):
        os.close(descriptor)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"Enter a prompt (RETURN to exit): ") == 3
    assert done.stdout.startswith(b"abc") and b"\nxy" in done.stdout
    assert b"Enter" not in done.stdout and b"not read" not in done.stdout


def test_top_p(run, config):
    """The tokens that are left, and their shares, are those of transformers; the command's smallest
    top_p leaves the likeliest token alone."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    expected = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.6)):
        expected = warper(None, expected)
    drawn = draw(logits.expand(20000, 300), Sampling(0.7, 40, 0.6))
    shares = drawn.flatten().bincount(minlength=300) / 20000
    torch.testing.assert_close(shares, expected.softmax(1)[0], atol=0.015, rtol=0)
    assert set(drawn.flatten().tolist()) == set(expected.isfinite()[0].nonzero().flatten().tolist())

    run("train", config.path, "--num_steps", 3)
    flags = ["--checkpoint_path", config.out, "--prompt", "abc"]
    narrow = run("sample", *flags, "--top_p", 1e-6)
    assert narrow.status == 0, narrow.err
    assert narrow.out == run("sample", *flags, "--temperature", 0).out


def test_sample_refusals(run, config):
    run("train", config.path, "--num_steps", 3)
    flags = ["--checkpoint_path", config.out / "checkpoint_3.mdl"]
    refused(
        run("sample", *flags, "--prompt", "Z"),
        "has a character that the vocabulary lacks",
    )
    refused(run("sample", *flags, "--prompt", ""), "the prompt is empty")
    refused(run("sample", *flags, "--top_k", 0, "--prompt", "a"), "start at 1")
    refused(run("sample", *flags, "--top_p", 0, "--prompt", "a"), "top_p: 0.0 is not above 0")
    refused(run("sample", "--checkpoint_path", "nowhere.mdl"), "there is no such checkpoint")


def test_a_checkpoint_of_another_shape(run, config):
    """A checkpoint whole in itself, but whose norm has one number, which would broadcast."""
    run("train", config.path, "--num_steps", 3)
    path = config.out / "checkpoint_3.mdl"
    file, manifest = path / "head.safetensors", read_sealed(path / "manifest.json")
    save_file({name: v[:1].clone() for name, v in load_file(file).items()}, file)
    content = file.read_bytes()
    manifest["files"][file.name] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_sealed(path / "manifest.json", manifest)
    seen = run("train", config.path, "--checkpoint_path", "latest")
    refused(seen, "head.norm.weight has shape [1], the model in model.py [32]")


def test_init_from_weights_that_lack_some(run, config, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    tensors = load_file(tmp_path / "gpt2" / "model.safetensors")
    del tensors["transformer.h.0.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    seen = run("train", config.path, "--init_from", tmp_path / "gpt2")
    assert seen.status == 1
    assert "it lacks transformer.h.0.mlp.c_fc.weight" in seen.err.splitlines()[-1]


def test_a_requeued_job_with_init_from_goes_on(run, trained, config, tmp_path):
    """Its command line does not change, and names a depth that init_from has overruled."""
    run("export", "--checkpoint_path", trained, "--out", tmp_path / "exported")
    flags = ["--init_from", tmp_path / "exported", "--checkpoint_path", "latest"]
    flags += ["--out_dir", tmp_path / "requeued", "--depth", 1]
    assert "starting from" in run("train", config.path, *flags, "--num_steps", 3).out
    seen = run("train", config.path, *flags)
    assert seen.status == 0, seen.err
    assert "at step 3" in seen.out


def parallel(self: Block, x: torch.Tensor) -> torch.Tensor:
    return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))


def squared_relu(self: MLP, x: torch.Tensor) -> torch.Tensor:
    return self.proj(F.relu(self.fc(x)).square())


def capped(self: Head, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return 0.2 * torch.tanh(F.linear(self.norm(x), table) / 0.2)


@pytest.mark.parametrize(
    ("part", "forward", "more"),
    [(Block, parallel, []), (MLP, squared_relu, ["--bias", "false"]), (Head, capped, [])],
)
def test_a_changed_model(run, config, monkeypatch, tmp_path, part, forward, more):
    """As the README changes it: what is written is what model.py computes, and it is no GPT-2."""
    where = "transformers' GPT-2 is another model: its logits differ from those of model.py"
    monkeypatch.setattr(part, "forward", forward)
    run("train", config.path, *more)
    path = config.out / "checkpoint_6.mdl"
    refused(run("export", "--checkpoint_path", path, "--out", tmp_path / "exported"), where)
    assert not (tmp_path / "exported").exists()
    flags = ["--checkpoint_path", path, "--prompt", "ab", "--max_new_tokens", 40]
    seen = run("sample", *flags, "--temperature", 0)
    assert f"warning: {where}" in seen.err and "generating with model.py" in seen.err
    checkpoint = Checkpoint(path)
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    for _ in range(40):
        ids = torch.cat([ids, our_logits(checkpoint, ids[:, -32:])[:, -1:].argmax(-1)], 1)
    assert seen.out == tokenizer.decode(ids[0]) + "\n"
    drawn = [run("sample", *flags, "--seed", seed).out for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_wider_mlp_and_another_parameter_are_no_gpt2(run, config, monkeypatch, tmp_path):
    build = Block.__init__

    def wider(self: Block, config: GPTConfig) -> None:
        build(self, config)
        self.mlp.fc = torch.nn.Linear(config.width, 2 * config.width)
        self.mlp.proj = torch.nn.Linear(2 * config.width, config.width)

    def further(self: Block, config: GPTConfig) -> None:
        build(self, config)
        self.ln_3 = Norm(config)
        self.register_forward_hook(lambda block, inputs, output: block.ln_3(output))

    for change, message in (
        (wider, "size mismatch for transformer.h.0.mlp.c_fc.weight"),
        (further, "'decoder.0.ln_3.weight' has no place in transformers' GPT-2"),
    ):
        monkeypatch.setattr(Block, "__init__", change)
        out = tmp_path / change.__name__
        run("train", config.path, "--num_steps", 1, "--out_dir", out)
        seen = run("export", "--checkpoint_path", out, "--out", tmp_path / "exported")
        refused(seen, message)
        seen = run("sample", "--checkpoint_path", out, "--prompt", "a", "--max_new_tokens", 3)
        assert seen.status == 0 and message in seen.err


def test_other_model_code_is_said(run, config, monkeypatch, tmp_path):
    run("train", config.path, "--num_steps", 3)
    commands = [
        ("eval", config.path, "--checkpoint_path", "latest"),
        ("sample", "--checkpoint_path", config.out, "--prompt", "a", "--max_new_tokens", 1),
        ("export", "--checkpoint_path", config.out, "--out", tmp_path / "exported"),
        ("train", config.path, "--checkpoint_path", "latest", "--num_steps", 4),
    ]
    note = "warning: model.py, loss.py or ops.py has changed since"
    assert note not in run(*commands[0]).err
    monkeypatch.setattr("weights.checkpoint.MODEL_CODE", "another")
    for command in commands:
        assert run(*command).err.count(note) == 1, command


def test_comments_do_not_change_the_code_of_a_model(tmp_path):
    for name in ("model.py", "loss.py", "ops.py"):
        (tmp_path / name).write_text("# a comment\n\n" + (ROOT / name).read_text())
    assert model_code(tmp_path) == MODEL_CODE
    with open(tmp_path / "loss.py", "a") as file:
        file.write("x = 1\n")
    assert model_code(tmp_path) != MODEL_CODE


def test_init_from_another_tokenizer(run, trained, config, tmp_path):
    """27 characters on both sides, which are not the same ones."""
    run("export", "--checkpoint_path", trained, "--out", tmp_path / "exported")
    other = write_dataset(tmp_path / "other", "ABC" * 300, "ABC" * 30)
    meta = read_sealed(other / "meta.json")
    write_sealed(other / "meta.json", meta | {"vocab_size": VOCABULARY})
    flags = ["--init_from", tmp_path / "exported", "--out_dir", tmp_path / "tuned"]
    seen = run("train", config.path, *flags, "--dataset", other)
    refused(seen, f"exported has another tokenizer than {other}; prepare the data with the tok")
    assert not (tmp_path / "tuned").exists()
    (tmp_path / "exported" / "tokenizer.json").unlink()
    seen = run("train", config.path, *flags, "--dataset", other, "--num_steps", 1)
    assert seen.status == 0
    assert "exported has no tokenizer.json: make sure that both use the same" in seen.err


def test_init_from_several_files_in_half_precision(run, trained, config, tmp_path):
    """As large models are published: an index, and tensors in bf16."""
    run("export", "--checkpoint_path", trained, "--out", tmp_path / "exported")
    for file in (tmp_path / "exported").glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    seen = run(
        *("train", config.path, "--init_from", tmp_path / "exported", "--num_steps", 1),
        *("--out_dir", tmp_path / "tuned", "--learning_rate", 1e-30, "--weight_decay", 0),
    )
    assert seen.status == 0, seen.err
    a, b = Checkpoint(trained), Checkpoint(tmp_path / "tuned" / "checkpoint_1.mdl")
    for name in b.tensors:
        if not name.startswith("exp_avg"):
            assert torch.equal(a.read(name).bfloat16().float(), b.read(name)), name


def test_too_large_to_sample(run, config, monkeypatch):
    run("train", config.path, "--num_steps", 3)
    monkeypatch.setattr("runtime.generation.host_memory", lambda: 50_000)
    seen = run("sample", "--checkpoint_path", config.out, "--prompt", "a")
    refused(seen, "checkpoint_3.mdl does not fit: its model needs 0.0 GB of memory")


def test_eval_that_is_not_finite_is_json(run, config):
    run("train", config.path, "--num_steps", 3)
    path = config.out / "checkpoint_3.mdl"
    damage_tensor(path, "head.norm.weight", lambda tensor: tensor * 1e38)
    seen = run("eval", config.path, "--checkpoint_path", path, "--json")
    result = json.loads(seen.out, parse_constant=lambda word: pytest.fail(word))
    assert result["loss"] is None or result["perplexity"] is None


def damage_tensor(path: Path, name: str, change) -> None:
    """Changes a tensor of a checkpoint as somebody would who knows the format."""
    manifest = read_sealed(path / "manifest.json")
    ((file, _),) = Checkpoint(path).tensors[name]["parts"]
    file = path / file
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name])}, file)
    manifest["files"][file.name]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    write_sealed(path / "manifest.json", manifest)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "1e-40"], "temperature: 1e-40 is neither 0 nor from 0.01 to 100"),
        (["--seed", "12345678901234567890123"], "12345678901234567890123 is not from 0 to 2**63"),
        (["--seed", "-1"], "seed: -1 is not from 0"),
        (
            ["--checkpoint_path", "latest", "--out_dir", "nowhere"],
            "nowhere: there is no such checkpoint or run",
        ),
    ],
)
def test_more_sample_refusals(run, config, flags, message):
    run("train", config.path, "--num_steps", 1)
    refused(run("sample", "--checkpoint_path", config.out, "--prompt", "a", *flags), message)


def test_a_model_of_one_position(run, config):
    flags = ["--sequence_length", 1, "--max_position_embeddings", 1, "--num_steps", 1]
    run("train", config.path, *flags)
    flags = ["--checkpoint_path", config.out, "--prompt", "abc", "--max_new_tokens", 4]
    seen = run("sample", *flags)
    assert seen.status == 0, seen.err
    assert len(seen.out) == len("abc") + 4 + 1


def test_a_run_is_named_by_its_folder(run, config, tmp_path):
    run("train", config.path)
    losses = [
        json.loads(run("eval", config.path, "--json", "--checkpoint_path", *words).out)
        for words in (["latest"], [config.out], [config.out / "checkpoint_6.mdl"])
    ]
    assert losses[0] == losses[1] == losses[2] and losses[0]["step"] == 6
    flags = ["--prompt", "ab", "--max_new_tokens", 5, "--checkpoint_path"]
    texts = [
        run("sample", *flags, *words).out
        for words in (["latest", "--out_dir", config.out], [config.out])
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 8
    seen = run("export", "--checkpoint_path", config.out, "--out", tmp_path / "exported")
    assert seen.status == 0
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "exported").iterdir()}
    assert set(modes.values()) == {0o644}, modes


def test_the_model_card(run, config, tmp_path):
    from huggingface_hub import ModelCard

    run("train", config.path)
    (val_loss,) = [r["val_loss"] for r in records(config.out, "val_loss")]
    assert run("export", "--checkpoint_path", config.out, "--out", tmp_path / "words").status == 0
    card = ModelCard.load(tmp_path / "words/README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "# words\n" in card.text and "A GPT-2 of 27,360 parameters" in card.text
    assert f"| data | {config.values['dataset']} |" in card.text
    assert f"| steps, tokens seen | 6, {6 * 4 * 32} |" in card.text
    assert f"| loss of the last step | {records(config.out)[-1]['loss']:.4f} nats" in card.text
    assert f"| validation loss | {val_loss:.4f} nats a token" in card.text
    again = tmp_path / "again.yaml"  # the configuration is one that trains
    again.write_text(card.text.split("```yaml\n")[1].removesuffix("```\n"))
    seen = run("train", again, "--out_dir", tmp_path / "again")
    assert seen.status == 0, seen.err
    assert records(tmp_path / "again")[-1]["loss"] == records(config.out)[-1]["loss"]


@pytest.mark.long
def test_a_push_without_a_token_or_a_network(run, config, tmp_path):
    run("train", config.path)
    words = [sys.executable, "export.py", "--checkpoint_path", config.out, "--push_to", "me/words"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_TOKEN", None)
    for token, message in (
        ({}, "push_to needs a token of the Hugging Face hub: hf auth login, or HF_TOKEN"),
        ({"HF_TOKEN": "hf_none"}, f"{tmp_path}/out2 is written, but not pushed to me/words: "),
    ):
        out = tmp_path / f"out{len(token) + 1}"
        kept = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment | token}
        done = subprocess.run(list(map(str, [*words, "--out", out])), **kept)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert message in done.stderr
        assert (out / "README.md").exists() == bool(token)
