"""eval.py, sample.py, export.py and init_from, on checkpoints that train.py wrote."""

import hashlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, records
from safetensors.torch import load_file, save_file
from test_train import refused

from checkpoint import Checkpoint
from export import load_model, load_tokenizer
from files import read_sealed, write_sealed
from model import GPT, GPTConfig

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
    shape = {k: checkpoint.config[k] for k in GPTConfig.__dataclass_fields__}
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
    assert theirs.config.activation_function == checkpoint.config["activation"]
    ids = torch.randint(VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(0))
    expected = our_logits(checkpoint, ids)
    assert expected.abs().max() > 0.1
    assert (theirs.eval()(ids).logits - expected).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("a b\ncd")["input_ids"]) == "a b\ncd"
    refused(run("export", "--checkpoint_path", trained, "--out", out), "is not an empty folder")


def test_there_and_back(run, trained, config, tmp_path):
    """init_from an exported model evaluates to the same loss: both ways are right."""
    out, back = tmp_path / "exported", tmp_path / "back"
    run("export", "--checkpoint_path", trained, "--out", out)
    seen = run(
        *("train", config.path, "--init_from", out, "--out_dir", back, "--num_steps", 1),
        *("--learning_rate", 1e-30, "--warmup_steps", 0, "--weight_decay", 0),
    )
    assert seen.status == 0, seen.err
    assert f"started from the weights of {out}" in seen.out
    a, b = (Checkpoint(path) for path in (trained, back / "checkpoint_1.mdl"))
    for key in ("width", "depth", "heads", "activation"):
        assert a.config[key] == b.config[key]
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
    assert checkpoint.config["activation"] == "gelu_new"
    assert checkpoint.config["max_position_embeddings"] == 40
    ids = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    assert (our_logits(checkpoint, ids) - theirs(ids).logits).abs().max() < 1e-4


def test_what_is_not_a_gpt2_is_refused(run, config, tmp_path):
    from transformers import GPT2Config, LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    seen = run("train", config.path, "--init_from", tmp_path / "llama")
    refused(seen, "this model can't be it, as its model_type is llama")
    GPT2Config(n_inner=100).save_pretrained(tmp_path / "inner")
    seen = run("train", config.path, "--init_from", tmp_path / "inner")
    refused(seen, "this model can't be it, as its n_inner is 100")


def test_export_without_biases(run, config, tmp_path):
    from transformers import GPT2LMHeadModel

    run("train", config.path, "--num_steps", 3, "--bias", "false")
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


def test_eval_takes_the_model_from_the_checkpoint(run, config):
    run("train", config.path, "--dropout", 0.3, "--num_steps", 3)
    checkpoint = config.out / "checkpoint_3.mdl"
    flags = ["--checkpoint_path", checkpoint, "--json", "--batch_size", 3]
    losses = [
        json.loads(run("eval", config.path, *flags, *more).out)["loss"]
        for more in ([], [], ["--width", 64, "--depth", 7, "--dropout", 0.5])
    ]
    assert losses[0] == losses[1] == losses[2]


def test_eval_refusals(run, config, tmp_path):
    refused(run("eval", config.path), "which checkpoint? add --checkpoint_path")
    refused(run("eval", config.path, "--checkpoint_path", "latest"), "which checkpoint?")
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
    assert (load_model(checkpoint)(ids).logits - our_logits(checkpoint, ids)).abs().max() < 1e-4
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    for _ in range(20):
        ids = torch.cat([ids, our_logits(checkpoint, ids)[:, -1:].argmax(-1)], 1)
    assert written == tokenizer.decode(ids[0])


def test_sample_asks_for_prompts(run, config, monkeypatch):
    run("train", config.path, "--num_steps", 3)
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\nZ\nxy\n\nnot read\n"))
    flags = ["--checkpoint_path", config.out / "checkpoint_3.mdl", "--max_new_tokens", 5]
    seen = run("sample", *flags)
    assert seen.status == 0
    assert seen.out.count("Enter a prompt (RETURN to exit): ") == 4
    assert "abc" in seen.out and "xy" in seen.out and "not read" not in seen.out


def test_sample_refusals(run, config):
    run("train", config.path, "--num_steps", 3)
    flags = ["--checkpoint_path", config.out / "checkpoint_3.mdl"]
    refused(
        run("sample", *flags, "--prompt", "Z"),
        "has a character that the checkpoint's vocabulary lacks",
    )
    refused(run("sample", *flags, "--prompt", ""), "the prompt is empty")
    refused(run("sample", *flags, "--top_k", 0, "--prompt", "a"), "start at 1")
    refused(run("sample", "--checkpoint_path", "nowhere.mdl"), "there is no such checkpoint")


def test_a_checkpoint_of_another_shape(run, config):
    """A checkpoint whole in itself, but whose norm has one number, which would broadcast."""
    run("train", config.path, "--num_steps", 3)
    path = config.out / "checkpoint_3.mdl"
    file, manifest = path / "norm.safetensors", read_sealed(path / "manifest.json")
    save_file({name: v[:1].clone() for name, v in load_file(file).items()}, file)
    content = file.read_bytes()
    manifest["files"][file.name] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    for name in ("norm.weight", "norm.bias"):
        manifest["tensors"][name] |= {"shape": [1], "parts": [{"file": file.name, "rows": [0, 1]}]}
    write_sealed(path / "manifest.json", manifest)
    seen = run("train", config.path, "--checkpoint_path", "latest")
    refused(seen, "norm.weight has shape [1], the model's is [32]: it is of another model")


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
    assert "started from" in run("train", config.path, *flags, "--num_steps", 3).out
    seen = run("train", config.path, *flags)
    assert seen.status == 0, seen.err
    assert "at step 3" in seen.out
