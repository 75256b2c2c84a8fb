"""eval.py, sample.py, export.py and init_from, on checkpoints that train.py wrote."""

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, VOCABULARY, records, refused, write_dataset
from helpers import our_logits, train_once
from safetensors.torch import load_file, save_file

from common.files import read_sealed, write_sealed
from model import MLP, Block, GPTConfig, Head, Norm
from runtime.samples import Sampling, draw
from weights.checkpoint import MODEL_CODE, Checkpoint, model_code
from weights.huggingface import INDEX, load_model, load_tokenizer

ODD = {"width": 48, "depth": 3, "heads": 4, "activation": "gelu_new"}
SHAPES = {"small": {}, "odd": ODD, "no bias": {"bias": "false"}, "untied": {"tied_head": "false"}}


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> SimpleNamespace:
    """A run of six steps (path, values, out) whose biases and norms are not what they were at the
    start, and its checkpoint. No test changes it."""
    config = train_once(tmp_path_factory.mktemp("trained"), dataset, **ODD, warmup_steps=0)
    config.checkpoint = config.out / "checkpoint_6.mdl"
    return config


@pytest.fixture
def exported(run, trained, tmp_path) -> Path:
    seen = run("export", "--checkpoint_path", trained.checkpoint, "--out", tmp_path / "exported")
    assert seen.status == 0, seen.err
    return tmp_path / "exported"


@pytest.mark.parametrize("shape", SHAPES)
def test_exported_model_is_the_same(run, config, tmp_path, shape):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    out, flags = tmp_path / "exported", [f"--{key}={value}" for key, value in SHAPES[shape].items()]
    run("train", config.path, *flags, "--num_steps", 3, "--warmup_steps", 0)
    assert run("export", "--checkpoint_path", config.out, "--out", out).status == 0
    theirs, report = GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    checkpoint = Checkpoint(config.out / "checkpoint_3.mdl")
    assert theirs.config.activation_function == checkpoint.config.activation
    ids = torch.randint(VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(0))
    expected = our_logits(checkpoint, ids)
    assert expected.abs().max() > 0.1
    assert (theirs.eval()(ids).logits - expected).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("a b\ncd")["input_ids"]) == "a b\ncd"
    refused(run("export", "--checkpoint_path", config.out, "--out", out), "is not an empty folder")


def test_the_files_of_an_export(run, trained, tmp_path, monkeypatch):
    """As transformers writes them: one, or several with their index, in the same order."""
    for name, largest in (("one", 10**9), ("several", 40_000)):
        monkeypatch.setattr("weights.huggingface.LARGEST_FILE", largest)
        seen = run("export", "--checkpoint_path", trained.out, "--out", tmp_path / name)
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


def test_evaluating_a_released_model(run, trained, exported, tmp_path):
    """As its checkpoint does, and as the training from it says before its first step."""
    tuned, shape = tmp_path / "tuned", ["--width", 8, "--depth", 8, "--heads", 8]
    results = []
    for flags in (["--init_from", exported, *shape], ["--checkpoint_path", "latest"]):
        seen = run("eval", trained.path, "--json", *flags)
        assert seen.status == 0, seen.err
        results.append(json.loads(seen.out))
    assert results[0]["step"] == 0
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)
    start = ["--init_from", exported]
    flags = [*start, "--out_dir", tuned, "--num_steps", 3, "--eval_on_start", "true"]
    assert "step 0/3 | val_loss" in run("train", trained.path, *flags).out
    first, last = records(tuned, "val_loss")
    assert (first["step"], last["step"]) == (0, 3)
    assert first["val_loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
    seen = run("plan", trained.path, *start)
    checkpoint = Checkpoint(trained.checkpoint)
    count = sum(math.prod(checkpoint.tensors[name]["shape"]) for name in checkpoint.weights)
    assert seen.status == 0 and f"{count:,} parameters" in seen.out, seen.err
    (exported / "config.json").unlink()
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    for words in (["eval", trained.path], ["plan", trained.path], ["sample", "--prompt", "a"]):
        refused(run(*words, *start), f"init_from: {exported}: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(run, config, trained, exported, dtype):
    """A training from an exported model, also in half precision, begins with the same weights."""
    for file in exported.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    flags = ["--num_steps", 1, "--learning_rate", 1e-30, "--warmup_steps", 0, "--weight_decay", 0]
    seen = run("train", config.path, "--init_from", exported, *flags)
    assert seen.status == 0, seen.err
    assert f"starting from the weights of {exported}" in seen.out
    a, b = Checkpoint(trained.checkpoint), Checkpoint(config.out / "checkpoint_1.mdl")
    for key in ODD:
        assert getattr(a.config, key) == getattr(b.config, key)
    for name in a.tensors:
        if not name.startswith("exp_avg"):
            assert torch.equal(a.read(name).to(dtype).float(), b.read(name)), name


def test_eval(run, trained):
    """Its loss is that of the training, whichever way the run is named."""
    checkpoint = ["--checkpoint_path", trained.checkpoint]
    result = json.loads(run("eval", trained.path, *checkpoint, "--json").out)
    meta = read_sealed(Path(trained.values["dataset"]) / "meta.json")
    assert (result["step"], result["tokens"]) == (6, meta["tokens"]["val"] - 1)
    ((val_loss,),) = [[r["val_loss"]] for r in records(trained.out, "val_loss")]
    assert result["loss"] == pytest.approx(val_loss, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2))  # 1 byte a token
    seen = run("eval", trained.path, "--checkpoint_path", "latest")
    assert f"loss {result['loss']:.6g} | perplexity" in seen.out
    seen = run("eval", trained.path, "--checkpoint_path", trained.out, "--json")
    assert json.loads(seen.out)["loss"] == result["loss"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoint_path is required"),
        (["--checkpoint_path", "tests"], "is not a checkpoint"),
        (["--checkpoint_path", "latest", "--dataset", "no"], "is missing: prepare the dataset"),
    ],
)
def test_eval_refusals(run, trained, flags, message):
    refused(run("eval", trained.path, *flags), message)


@pytest.fixture
def sample(run, trained):
    """sample(*arguments): `python sample.py` with the trained model."""
    return lambda *arguments: run("sample", "--checkpoint_path", trained.checkpoint, *arguments)


def test_sample(run, trained, sample):
    words = ["--prompt", "ab cd", "--max_new_tokens", 40]  # beyond the model's 32 positions
    first = sample(*words)
    assert first.status == 0, first.err
    assert first.out.startswith("ab cd")
    assert len(first.out) == len("ab cd") + 40 + 1
    assert sample(*words).out == first.out
    assert run("sample", "--checkpoint_path", trained.out, *words).out == first.out
    latest = ["--checkpoint_path", "latest", "--out_dir", trained.out]
    assert run("sample", *latest, *words).out == first.out
    assert sample(*words, "--seed", 1).out != first.out
    likeliest = [sample(*words, "--temperature", 0, "--seed", seed).out for seed in (0, 1)]
    assert likeliest[0] == likeliest[1]
    several = sample("--prompt", "ab cd", "--num_samples", 3, "--max_new_tokens", 5)
    assert several.out.count("ab cd") == 3


def test_sample_follows_the_model(sample, trained):
    """The likeliest next tokens by our own model are what transformers' generate writes."""
    checkpoint = Checkpoint(trained.checkpoint)
    ids = torch.arange(20)[None]
    model = load_model(checkpoint, checkpoint.check_model(), "cpu", torch.float32)
    assert (model(ids).logits - our_logits(checkpoint, ids)).abs().max() < 1e-4
    written = sample("--prompt", "ab", "--temperature", 0, "--max_new_tokens", 20).out
    assert written == likeliest(checkpoint, "ab", 20) + "\n"


def likeliest(checkpoint: Checkpoint, prompt: str, count: int) -> str:
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(count):
        ids = torch.cat([ids, our_logits(checkpoint, ids[:, -32:])[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0])


def test_sample_reads_prompts_from_a_pipe(sample, monkeypatch):
    """Each line is one, but for empty ones; stdout has the texts alone."""
    short = ["--max_new_tokens", 5]
    expected = [sample(*short, "--prompt", prompt).out for prompt in ("abc", "xy")]
    monkeypatch.setattr("sys.stdin", io.StringIO("\nabc\n\nZ\n"))
    seen = sample(*short)
    assert (seen.status, seen.out) == (0, expected[0])
    assert "warning: the prompt 'Z' has a character that the vocabulary lacks" in seen.err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\nxy"))
    assert sample(*short).out == expected[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    refused(sample(*short), "stdin is not text in utf-8")


@pytest.mark.long
def test_sample_asks_for_prompts_on_a_terminal(trained):
    """Up to an empty line; the question is not in stdout."""
    flags = ["--checkpoint_path", trained.checkpoint, "--max_new_tokens", "5"]
    ours, terminal = os.openpty()
    os.write(ours, b"abc\nxy\n\nnot read\n")
    words = [sys.executable, "sample.py", *flags]
    done = subprocess.run(words, cwd=ROOT, stdin=terminal, capture_output=True)
    for descriptor in (ours, terminal):
        os.close(descriptor)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"Enter a prompt (RETURN to exit): ") == 3
    assert done.stdout.startswith(b"abc") and b"\nxy" in done.stdout
    assert b"Enter" not in done.stdout and b"not read" not in done.stdout


def test_top_p(sample):
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

    words = ["--prompt", "abc", "--max_new_tokens", 20]
    narrow = sample(*words, "--top_p", 1e-6)
    assert narrow.status == 0, narrow.err
    assert narrow.out == sample(*words, "--temperature", 0).out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prompt", "Z", "has a character that the vocabulary lacks"),
        ("prompt", "", "the prompt is empty"),
        ("top_k", 0, "start at 1"),
        ("top_p", 0, "top_p: 0.0 is not above 0"),
        ("temperature", "1e-40", "temperature: 1e-40 is neither 0 nor from 0.01 to 100"),
        ("seed", "12345678901234567890123", "12345678901234567890123 is not from 0 to 2**63"),
        ("seed", "-1", "seed: -1 is not from 0"),
        ("checkpoint_path", "nowhere.mdl", "there is no such checkpoint"),
        ("checkpoint_path", "latest", "model_dir: there is no such checkpoint or run"),
    ],
)
def test_sample_refusals(sample, tmp_path, monkeypatch, key, value, message):
    monkeypatch.chdir(tmp_path)
    refused(sample("--prompt", "a", f"--{key}", value), message)


def damage_tensor(trained, out: Path, name: str, change) -> Path:
    """A checkpoint with a changed tensor, as made by somebody who knows the format."""
    path = shutil.copytree(trained.checkpoint, out / "checkpoint_6.mdl")
    manifest = read_sealed(path / "manifest.json")
    ((file, _),) = Checkpoint(path).tensors[name]["parts"]
    tensors = load_file(path / file)
    save_file(tensors | {name: change(tensors[name])}, path / file)
    content = (path / file).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    manifest["files"][file] = {"bytes": len(content), "sha256": sha256}
    write_sealed(path / "manifest.json", manifest)
    return path


def test_a_checkpoint_of_another_shape(run, trained, tmp_path):
    """A checkpoint whole in itself, but whose norm has one number, which would broadcast."""
    path = damage_tensor(trained, tmp_path, "head.norm.weight", lambda norm: norm[:1].clone())
    seen = run("train", trained.path, "--checkpoint_path", path, "--out_dir", tmp_path / "out")
    refused(seen, "head.norm.weight has shape [1], the model in model.py [48]")


def test_eval_that_is_not_finite_is_json(run, trained, tmp_path):
    path = damage_tensor(trained, tmp_path, "head.norm.weight", lambda norm: norm * 1e38)
    seen = run("eval", trained.path, "--checkpoint_path", path, "--json")
    result = json.loads(seen.out, parse_constant=lambda word: pytest.fail(word))
    assert result["loss"] is None or result["perplexity"] is None


def test_a_requeued_job_with_init_from_goes_on(run, config, exported):
    """Its command line does not change, and names a depth that init_from has overruled."""
    flags = ["--init_from", exported, "--checkpoint_path", "latest", "--depth", 1]
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
    assert seen.out == likeliest(Checkpoint(path), "ab", 40) + "\n"
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


def test_other_model_code_is_said(run, trained, monkeypatch, tmp_path):
    which = ["--checkpoint_path", trained.checkpoint]
    commands = [
        ("eval", trained.path, *which),
        ("sample", *which, "--prompt", "a", "--max_new_tokens", 1),
        ("export", *which, "--out", tmp_path / "exported"),
        ("train", trained.path, *which, "--num_steps", 7, "--out_dir", tmp_path / "out"),
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


def test_init_from_another_tokenizer(run, config, exported, tmp_path):
    """27 characters on both sides, which are not the same ones."""
    other = write_dataset(tmp_path / "other", "ABC" * 300, "ABC" * 30)
    meta = read_sealed(other / "meta.json")
    write_sealed(other / "meta.json", meta | {"vocab_size": VOCABULARY})
    flags = ["--init_from", exported, "--dataset", other]
    seen = run("train", config.path, *flags)
    refused(seen, f"exported has another tokenizer than {other}; prepare the data with the tok")
    assert not config.out.exists()
    (exported / "tokenizer.json").unlink()
    seen = run("train", config.path, *flags, "--num_steps", 1)
    assert seen.status == 0
    assert "exported has no tokenizer.json: make sure that both use the same" in seen.err


def test_too_large_to_sample(sample, monkeypatch):
    monkeypatch.setattr("runtime.generation.host_memory", lambda: 50_000)
    refused(sample("--prompt", "a"), "checkpoint_6.mdl does not fit: its model needs 0.0 GB of mem")


def test_a_model_of_one_position(run, config):
    flags = ["--sequence_length", 1, "--max_position_embeddings", 1, "--num_steps", 1]
    run("train", config.path, *flags)
    flags = ["--checkpoint_path", config.out, "--prompt", "abc", "--max_new_tokens", 4]
    seen = run("sample", *flags)
    assert seen.status == 0, seen.err
    assert len(seen.out) == len("abc") + 4 + 1


def test_the_model_card(run, trained, exported, tmp_path):
    from huggingface_hub import ModelCard

    (val_loss,) = [r["val_loss"] for r in records(trained.out, "val_loss")]
    card = ModelCard.load(exported / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "# exported\n" in card.text and "A GPT-2 of 87,744 parameters" in card.text
    assert f"| data | {trained.values['dataset']} |" in card.text
    assert f"| steps, tokens seen | 6, {6 * 4 * 32} |" in card.text
    assert f"| loss of the last step | {records(trained.out)[-1]['loss']:.4f} nats" in card.text
    assert f"| validation loss | {val_loss:.4f} nats a token" in card.text
    again = tmp_path / "again.yaml"  # the configuration is one that trains
    again.write_text(card.text.split("```yaml\n")[1].removesuffix("```\n"))
    seen = run("train", again, "--out_dir", tmp_path / "again")
    assert seen.status == 0, seen.err
    assert records(tmp_path / "again")[-1]["loss"] == records(trained.out)[-1]["loss"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in exported.iterdir()}
    assert set(modes.values()) == {0o644}, modes


@pytest.mark.long
def test_a_push_without_a_token_or_a_network(trained, tmp_path):
    words = [sys.executable, "export.py", "--checkpoint_path", trained.out]
    words += ["--push_to", "me/words", "--out", tmp_path / "out"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_TOKEN", None)
    for token, message in (
        ({}, "push_to needs a token of the Hugging Face hub: hf auth login, or HF_TOKEN"),
        ({"HF_TOKEN": "hf_none"}, f"{tmp_path}/out is written, but not pushed to me/words: "),
    ):
        kept = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment | token}
        done = subprocess.run(list(map(str, words)), **kept)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert message in done.stderr
        assert (tmp_path / "out/README.md").exists() == bool(token)
