"""Folders of other people's models, whatever is in them: what they hold equals transformers' model,
or is refused in a line that names what is odd. Their code is not run, nor do their claims take
memory."""

import io
import json
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, refused
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    logging,
)

from common.console import UserError
from configuration import Configuration
from model import GPT
from weights.huggingface import read_hugging_face

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHORT = {"sequence_length": 8}


def gpt2_keys(source: random.Random) -> dict:
    heads = source.choice([1, 2, 3])
    return {
        "n_embd": 8 * heads * source.choice([1, 2]),
        "n_head": heads,
        "n_layer": source.choice([1, 2, 3]),
        "n_inner": source.choice([None, None, 20, 33]),
        "n_positions": source.choice([9, 16, 40]),
        "activation_function": source.choice(["gelu", "gelu_new"]),
        "layer_norm_epsilon": source.choice([1e-5, 1e-6, 1e-2]),
        "tie_word_embeddings": source.random() < 0.7,
        "reorder_and_upcast_attn": source.random() < 0.2,
        "resid_pdrop": source.choice([0.0, 0.3]),
        "summary_type": source.choice(["cls_index", "last"]),
    }


def llama_keys(source: random.Random) -> dict:
    heads = source.choice([2, 4])
    return {
        "hidden_size": 8 * heads * source.choice([1, 2]),
        "num_attention_heads": heads,
        "num_key_value_heads": source.choice([1, 2, heads]),
        "num_hidden_layers": source.choice([1, 2, 3]),
        "intermediate_size": source.choice([24, 31]),
        "max_position_embeddings": source.choice([9, 40, 300]),
        "rms_norm_eps": source.choice([1e-5, 1e-6, 1e-2]),
        "tie_word_embeddings": source.random() < 0.5,
        "attention_bias": source.random() < 0.3,
        "mlp_bias": source.random() < 0.3,
        "head_dim": source.choice([None, None, 6, 16]),
        "pad_token_id": source.choice([None, 30]),
        "rope_parameters": source.choice([{"rope_type": "default", "rope_theta": 500.0}, LLAMA3]),
    }


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# What model.py can't compute: a third of the models have one of these, and a refusal names its key
GPT2_ODD = [
    {"activation_function": "relu"},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    {"add_cross_attention": True},
]
LLAMA_ODD = [
    {"hidden_act": "gelu"},
    {"rope_parameters": LINEAR},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
    {"rope_parameters": LLAMA3 | {"low_freq_factor": 1.1}},
]


def mistral_keys(source: random.Random) -> dict:
    keys = {k: v for k, v in llama_keys(source).items() if "bias" not in k}
    return keys | {"sliding_window": source.choice([None, 8, 400])}


def qwen2_keys(source: random.Random) -> dict:
    keys = {k: v for k, v in llama_keys(source).items() if k not in ("mlp_bias", "attention_bias")}
    return keys | {"head_dim": 8}


def qwen3_keys(source: random.Random) -> dict:
    keys = {k: v for k, v in llama_keys(source).items() if k != "mlp_bias"}
    return keys | {"head_dim": source.choice([6, 8, 16])}


KINDS = {
    "gpt2": (gpt2_keys, GPT2_ODD),
    "llama": (llama_keys, LLAMA_ODD),
    "mistral": (mistral_keys, LLAMA_ODD),
    "qwen2": (qwen2_keys, LLAMA_ODD),
    "qwen3": (qwen3_keys, LLAMA_ODD),
}


def random_model(seed: int) -> tuple[torch.nn.Module, list[str]]:
    """A model of transformers with weights that have nothing in common with its initial ones, and
    the key that model.py can't compute, if there is one."""
    source = random.Random(seed)
    kind = source.choice(["gpt2", "llama", *KINDS])
    keys, odds = KINDS[kind]
    odd = odds[seed // 3 % len(odds)] if seed % 3 == 0 else {}
    ends = {"bos_token_id": None, "eos_token_id": None, "vocab_size": source.choice([31, 40])}
    shape = {**keys(source), **ends, **odd}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model.to(source.choice([torch.float32, torch.float32, torch.bfloat16])), [*odd][:1]


class Folder:
    """A saved model, with one oddity; `odd` are the names that a refusal of it may give."""

    def __init__(self, path: Path, seed: int):
        self.path, self.source = path, random.Random(seed)
        torch.manual_seed(seed)
        self.model, self.odd = random_model(seed)
        self.model.save_pretrained(path, max_shard_size=self.source.choice(["4KB", "1GB"]))
        oddity = ODDITIES[seed % len(ODDITIES)]
        if oddity is not None:
            oddity(self)

    def configure(self, **keys) -> None:
        file = self.path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    def rewrite(self, change) -> None:
        """Writes changed tensors, as one file."""
        files = list(self.path.glob("*.safetensors"))
        tensors = {name: t for file in files for name, t in load_file(file).items()}
        for file in (*files, self.path / INDEX):
            file.unlink(missing_ok=True)
        save_file(change(tensors), self.path / WEIGHTS, {"format": "pt"})

    @property
    def prefix(self) -> str:
        return self.model.base_model_prefix + "."


def not_causal(folder: Folder) -> None:
    folder.configure(is_causal=False)
    folder.odd.append("is_causal")


def unknown_keys(folder: Folder) -> None:
    folder.configure(n_ctx=1024, task_specific_params={"text": {"do_sample": True}}, foo=[1])


def harmless_keys(folder: Folder) -> None:
    folder.configure(num_labels=3, torch_dtype="float16", use_cache=False)


def other_names(folder: Folder) -> None:
    """GPT-2's keys by the names that all models share, as transformers also reads them."""
    if folder.model.config.model_type == "gpt2":
        file = folder.path / "config.json"
        keys = json.loads(file.read_text())
        keys["hidden_size"], keys["num_hidden_layers"] = keys.pop("n_embd"), keys.pop("n_layer")
        file.write_text(json.dumps(keys))


def other_head(folder: Folder) -> None:
    folder.configure(tie_word_embeddings=True)
    table = folder.model.get_input_embeddings().weight
    head = torch.randn_like(table)
    folder.rewrite(lambda tensors: tensors | {"lm_head.weight": head})
    folder.odd.append("tie_word_embeddings")


def same_head(folder: Folder) -> None:
    folder.configure(tie_word_embeddings=True)
    table = folder.model.get_input_embeddings().weight
    folder.rewrite(lambda tensors: tensors | {"lm_head.weight": table.clone()})


def two_names(folder: Folder) -> None:
    prefix = folder.prefix

    def change(tensors: dict) -> dict:
        name = next(name for name in sorted(tensors) if name.startswith(prefix))
        return tensors | {name.removeprefix(prefix): torch.randn_like(tensors[name])}

    folder.rewrite(change)
    folder.odd.append("two tensors")


def no_prefix(folder: Folder) -> None:
    folder.rewrite(lambda tensors: {k.removeprefix(folder.prefix): t for k, t in tensors.items()})


def prefixed_head(folder: Folder) -> None:
    def change(tensors: dict) -> dict:
        head = tensors.pop("lm_head.weight", None)
        return tensors if head is None else tensors | {folder.prefix + "lm_head.weight": head}

    folder.rewrite(change)


def more_tensors(folder: Folder) -> None:
    more = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "foo.weight": torch.ones(3)}
    folder.rewrite(lambda tensors: tensors | more)


def add_layers(folder: Folder, count: int) -> None:
    config = folder.model.config
    layers = max(1, config.num_hidden_layers + count)
    folder.configure(**{config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): layers})
    if hasattr(config, "layer_types"):
        folder.configure(layer_types=["full_attention"] * layers)


def fewer_layers(folder: Folder) -> None:
    add_layers(folder, -1)


def more_layers(folder: Folder) -> None:
    add_layers(folder, 1)
    folder.odd.append("it lacks")


def an_older_index(folder: Folder) -> None:
    """As export.py leaves one, when transformers saves its model into the same folder."""
    folder.rewrite(lambda tensors: tensors)
    older = {name: torch.randn_like(t) for name, t in load_file(folder.path / WEIGHTS).items()}
    save_file(older, folder.path / "older.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(older, "older.safetensors")}
    (folder.path / INDEX).write_text(json.dumps(index))


def a_chosen_file(folder: Folder) -> None:
    folder.rewrite(lambda tensors: tensors)
    others = {name: torch.randn_like(t) for name, t in load_file(folder.path / WEIGHTS).items()}
    save_file(others, folder.path / "chosen.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(others, "chosen.safetensors")}
    (folder.path / "chosen.safetensors.index.json").write_text(json.dumps(index))
    names = ["chosen.safetensors", "chosen.safetensors.index.json"]
    folder.configure(transformers_weights=folder.source.choice(names))


ODDITIES = [
    *(None, not_causal, unknown_keys, harmless_keys, None, other_names, other_head, same_head),
    *(two_names, None, no_prefix, prefixed_head, more_tensors, fewer_layers, more_layers),
    *(an_older_index, a_chosen_file),
]


@torch.no_grad()
def test_imports_equal_transformers_or_name_what_is_odd(tmp_path):
    logging.disable_progress_bar()
    results = []
    for seed in range(8 * len(ODDITIES)):
        folder = Folder(tmp_path / str(seed), seed)
        try:
            config, read = read_hugging_face(Configuration(init_from=str(folder.path), **SHORT))
        except UserError as error:
            names = [name for name in folder.odd if name in str(error)]
            assert names and str(folder.path) in str(error), f"seed {seed}: {error}"
            results.append(names[0])
            continue
        theirs = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
        ours = GPT(config).eval()
        ours.load_state_dict({name: read(name) for name in ours.state_dict()})
        ids = torch.randint(config.vocab_size, (2, min(40, config.max_position_embeddings)))
        expected = theirs(ids)[0]
        close = (ours(ids) - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
        assert close, f"seed {seed}: {ODDITIES[seed % len(ODDITIES)]}"
        results.append("equal")
        shutil.rmtree(folder.path)
    assert len(results) >= 120
    assert results.count("equal") >= 60
    keys = {key for odd in (*GPT2_ODD, *LLAMA_ODD) for key in [*odd][:1]}
    assert {*keys, "is_causal", "tie_word_embeddings", "two tensors", "it lacks"} <= set(results)


@pytest.fixture
def released(tmp_path, dataset) -> Folder:
    """A small GPT-2 with the tokenizer of the dataset, as transformers saves them."""
    folder = Folder.__new__(Folder)
    folder.path = tmp_path / "released"
    shape = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    folder.model = GPT2LMHeadModel(shape)
    folder.model.save_pretrained(folder.path)
    tokenizer = Tokenizer.from_file(str(dataset / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder.path)
    return folder


def change(file: Path, **keys) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize("model_type", ["evil", "gpt2"])
@pytest.mark.parametrize("command", ["train", "sample"])
def test_code_of_a_model_is_not_run(run, config, released, monkeypatch, command, model_type):
    """Nor is it asked for: the answer would be taken from the prompts."""
    marker = released.path / "ran"
    code = f"import os\nos.mkdir({str(marker)!r})\nfrom transformers import GPT2Config as Evil\n"
    (released.path / "evil.py").write_text(code)
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    released.configure(model_type=model_type, auto_map=auto_map)
    words = {"train": ["train", config.path], "sample": ["sample", "--max_new_tokens", 2]}[command]
    monkeypatch.setattr("sys.stdin", io.StringIO("y\nab\n"))
    seen = run(*words, "--init_from", released.path)
    refused(seen, f"init_from: {released.path}: its config.json: auto_map names other files, whose")
    assert not seen.out
    assert not marker.exists()


def test_code_of_a_tokenizer_is_not_run(run, config, released, monkeypatch, tmp_path):
    """In a released folder, and beside the tokenizer of a checkpoint."""
    run("train", config.path, "--num_steps", 1)
    checkpoint = config.out / "checkpoint_1.mdl"
    marker = tmp_path / "ran"
    for folder in (released.path, checkpoint):
        code = f"import os\nos.mkdir({str(marker)!r})\n"
        (folder / "evil.py").write_text(code)
        keys = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
        (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    out = tmp_path / "exported"
    for words in (
        ("sample", "--init_from", released.path, "--max_new_tokens", 2),
        ("sample", "--checkpoint_path", checkpoint, "--max_new_tokens", 2),
        ("export", "--checkpoint_path", checkpoint, "--out", out),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\nab\n"))
        seen = run(*words)
        refused(seen, "its tokenizer_config.json: auto_map names other files, whose code is never")
        assert not marker.exists()


def test_a_folder_brings_no_pickle_kernel_or_beams(run, released):
    """Only safetensors are read; how to attend and to draw is not taken from the folder."""
    beams = {"num_beams": 10**6, "max_time": 0.0, "repetition_penalty": 9.0}
    (released.path / "generation_config.json").write_text(json.dumps(beams))
    released.configure(attn_implementation="evil/kernel", _attn_implementation="evil/kernel")
    flags = ["--init_from", released.path, "--prompt", "ab", "--max_new_tokens", 3]
    seen = run("sample", *flags)
    assert seen.status == 0, seen.err
    tensors = load_file(released.path / WEIGHTS)
    torch.save(tensors, released.path / "pytorch_model.bin")
    (released.path / WEIGHTS).unlink()
    refused(run("sample", *flags), "it has pytorch_model.bin, which can run code and is not read")


CLAIMS = {
    "num_labels": 10**8,
    "n_layer": 10**9,
    "text_config": {"num_labels": 10**8},
}


@pytest.mark.parametrize("key", CLAIMS)
@pytest.mark.parametrize("command", ["train", "sample"])
def test_what_a_configuration_claims_takes_no_memory(run, config, released, command, key):
    """In a process that can take 1 GB more than it has."""
    released.configure(**{key: CLAIMS[key]})
    words = {"train": [config.path], "sample": ["--prompt", "ab"]}[command]
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    try:
        seen = run(command, *words, "--init_from", released.path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    name = "num_labels" if "text" in key else key
    refused(seen, f"its config.json: {name} is 1")


def test_a_value_of_another_type_is_named(run, config, released):
    released.configure(layer_norm_epsilon="small")
    seen = run("train", config.path, "--init_from", released.path)
    refused(seen, "'layer_norm_epsilon': TypeError: Field 'layer_norm_epsilon' expected float, got")


def test_tensors_that_are_not_used_are_named(run, config, released):
    released.configure(n_layer=1)
    seen = run("train", config.path, "--init_from", released.path, "--num_steps", 1)
    assert seen.status == 0, seen.err
    assert "12 tensors of its files are not used, such as 'transformer.h.1." in seen.err


def test_a_sampled_model_is_whole(run, released):
    """transformers would draw what is missing."""
    released.configure(n_layer=3)
    seen = run("sample", "--init_from", released.path, "--prompt", "ab")
    *_, line = seen.err.splitlines()  # transformers has written more
    assert seen.status == 1
    assert f"init_from: {released.path}: it lacks transformer.h.2.attn.c_attn.bias" in line


def test_training_goes_on_from_what_transformers_saved_last(run, config, tmp_path):
    """Exported, trained with transformers, saved into the same folder, and continued here."""
    run("train", config.path, "--num_steps", 1)
    out = tmp_path / "exported"
    assert run("export", "--checkpoint_path", config.out, "--out", out).status == 0
    theirs = GPT2LMHeadModel.from_pretrained(out)
    shutil.copy(out / WEIGHTS, out / "old.safetensors")  # as a larger model's files
    names = dict.fromkeys(load_file(out / WEIGHTS), "old.safetensors")
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    theirs.transformer.ln_f.weight.data += 1
    theirs.save_pretrained(out)
    assert (out / INDEX).exists()
    config, read = read_hugging_face(Configuration(init_from=str(out), **SHORT))
    assert torch.equal(read("head.norm.weight"), theirs.transformer.ln_f.weight)
    assert torch.equal(read("head.norm.weight", slice(3, 9)), theirs.transformer.ln_f.weight[3:9])


def explode(step: dict, times: int) -> dict:
    return {"type": "Sequence", "normalizers": [step] * times}


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


# A tokenizer that makes a text very long, or whose regular expression takes exponential time
EXPLODING = {
    "text": {"normalizer": explode(replace({"String": "a"}, "aa"), 40)},
    "regex": {"normalizer": explode(replace({"Regex": "(?=a)"}, "a"), 40)},
    "prefix": {"normalizer": explode({"type": "Prepend", "prepend": "a" * 100}, 5)},
    "bytes": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}] * 30,
        }
    },
}
SLOW = replace({"Regex": "(a+)+$"}, "a")


@pytest.mark.parametrize("name", EXPLODING)
def test_a_tokenizer_that_fills_the_memory(run, config, released, name):
    file = released.path / "tokenizer.json"
    change(file, **EXPLODING[name])
    flags = ["--init_from", released.path, "--prompt", "a" * 60, "--max_new_tokens", 3]
    refused(run("sample", *flags), "its steps can make a text over 10,000 times longer")
    seen = run("train", config.path, "--init_from", released.path)
    refused(seen, f"init_from: {released.path}: its steps can make a text over 10,000 times longer")


def test_a_tokenizer_that_panics(run, released):
    """The package tokenizers raises a BaseException there."""
    change(released.path / "tokenizer.json", normalizer=SLOW)
    flags = ["--init_from", released.path, "--prompt", "a" * 40 + "b", "--max_new_tokens", 3]
    seen = run("sample", *flags)
    *_, line = seen.err.splitlines()  # the package has written more
    assert seen.status == 1
    assert line.startswith("error: the prompt 'aaa") and "or its tokenizer is damaged: " in line
