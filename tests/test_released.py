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


def llama_keys(kind: str, source: random.Random) -> dict:
    heads = source.choice([2, 4])
    keys = {
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
    own, absent = KINDS[kind]
    keys |= {key: source.choice(values) for key, values in own.items()}
    return {key: value for key, value in keys.items() if key not in absent}


KINDS = {  # keys of a kind's own and their values, and keys of Llama that it has not
    "llama": ({}, ()),
    "mistral": ({"sliding_window": [None, 8, 400]}, ("attention_bias", "mlp_bias")),
    "qwen2": ({"head_dim": [8]}, ("attention_bias", "mlp_bias")),
    "qwen3": ({"head_dim": [6, 8, 16]}, ("mlp_bias",)),
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


def random_model(seed: int) -> tuple[torch.nn.Module, list[str]]:
    """A model of transformers with weights that have nothing in common with its initial ones, and
    the key that model.py can't compute, if there is one."""
    source = random.Random(seed)
    kind = source.choice(["gpt2", "gpt2", "llama", *KINDS])
    odds = GPT2_ODD if kind == "gpt2" else LLAMA_ODD
    keys = gpt2_keys(source) if kind == "gpt2" else llama_keys(kind, source)
    odd = odds[seed // 3 % len(odds)] if seed % 3 == 0 else {}
    ends = {"bos_token_id": None, "eos_token_id": None, "vocab_size": source.choice([31, 40])}
    shape = {**keys, **ends, **odd}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model.to(source.choice([torch.float32, torch.float32, torch.bfloat16])), [*odd][:1]


class Folder:
    """A saved model, with one oddity; `odd` are the names that a refusal of it may give."""

    def __init__(self, path: Path, seed: int):
        self.path, source = path, random.Random(seed)
        torch.manual_seed(seed)
        self.model, self.odd = random_model(seed)
        self.model.save_pretrained(path, max_shard_size=source.choice(["4KB", "1GB"]))
        change, name = ODDITIES[seed % len(ODDITIES)]
        if change is not None:
            self.change(change)
        self.odd += [name] if name else []

    def configure(self, **keys) -> None:
        file = self.path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    def change(self, change) -> None:
        """change(keys, tensors, prefix) changes what the files hold; the tensors become one."""
        files, config = list(self.path.glob("*.safetensors")), self.path / "config.json"
        tensors = {name: t for file in files for name, t in load_file(file).items()}
        for file in (*files, self.path / INDEX):
            file.unlink(missing_ok=True)
        keys = json.loads(config.read_text())
        change(keys, tensors, self.model.base_model_prefix + ".")
        config.write_text(json.dumps(keys))
        save_file(tensors, self.path / WEIGHTS, {"format": "pt"})


def not_causal(keys: dict, tensors: dict, prefix: str) -> None:
    keys["is_causal"] = False


def more_keys(keys: dict, tensors: dict, prefix: str) -> None:
    keys |= {"n_ctx": 1024, "task_specific_params": {"text": {"do_sample": True}}, "foo": [1]}
    keys |= {"num_labels": 3, "torch_dtype": "float16", "use_cache": False}


def other_names(keys: dict, tensors: dict, prefix: str) -> None:
    """GPT-2's keys by the names that all models share, as transformers also reads them."""
    if keys["model_type"] == "gpt2":
        keys["hidden_size"] = keys.pop("n_embd")
        keys["num_hidden_layers"] = keys.pop("n_layer")


def table_of(tensors: dict, prefix: str) -> torch.Tensor:
    names = (prefix + "wte.weight", prefix + "embed_tokens.weight")
    return next(tensors[name] for name in names if name in tensors)


def other_head(keys: dict, tensors: dict, prefix: str) -> None:
    keys["tie_word_embeddings"] = True
    tensors["lm_head.weight"] = torch.randn_like(table_of(tensors, prefix))


def same_head(keys: dict, tensors: dict, prefix: str) -> None:
    keys["tie_word_embeddings"] = True
    tensors["lm_head.weight"] = table_of(tensors, prefix).clone()


def two_names(keys: dict, tensors: dict, prefix: str) -> None:
    name = next(name for name in sorted(tensors) if name.startswith(prefix))
    tensors[name.removeprefix(prefix)] = torch.randn_like(tensors[name])


def no_prefix(keys: dict, tensors: dict, prefix: str) -> None:
    for name in list(tensors):
        tensors[name.removeprefix(prefix)] = tensors.pop(name)


def prefixed_head(keys: dict, tensors: dict, prefix: str) -> None:
    if "lm_head.weight" in tensors:
        tensors[prefix + "lm_head.weight"] = tensors.pop("lm_head.weight")


def more_tensors(keys: dict, tensors: dict, prefix: str) -> None:
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "foo.weight": torch.ones(3)}


def fewer_layers(keys: dict, tensors: dict, prefix: str, more: int = -1) -> None:
    name = "n_layer" if "n_layer" in keys else "num_hidden_layers"
    keys[name] = max(1, keys[name] + more)
    if "layer_types" in keys:
        keys["layer_types"] = ["full_attention"] * keys[name]


def more_layers(keys: dict, tensors: dict, prefix: str) -> None:
    fewer_layers(keys, tensors, prefix, 1)


ODDITIES = [  # a change, and the name that a refusal of it gives
    (None, None),
    (not_causal, "is_causal"),
    (more_keys, None),
    (None, None),
    (other_names, None),
    (other_head, "tie_word_embeddings"),
    (same_head, None),
    (two_names, "two tensors"),
    (no_prefix, None),
    (prefixed_head, None),
    (more_tensors, None),
    (fewer_layers, None),
    (more_layers, "it lacks"),
]


def other_weights(folder: Folder, file: str, index: str) -> None:
    """Other tensors than the model's, and their index."""
    folder.change(lambda *unchanged: None)
    others = {name: torch.randn_like(t) for name, t in load_file(folder.path / WEIGHTS).items()}
    save_file(others, folder.path / file, {"format": "pt"})
    content = {"metadata": {}, "weight_map": dict.fromkeys(others, file)}
    (folder.path / index).write_text(json.dumps(content))


@torch.no_grad()
def equals_transformers(folder: Folder) -> bool:
    """Whether the logits do. Raises UserError for what is refused."""
    config, read = read_hugging_face(Configuration(init_from=str(folder.path), **SHORT))
    theirs = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    ours = GPT(config).eval()
    ours.load_state_dict({name: read(name) for name in ours.state_dict()})
    assert torch.equal(read("head.norm.weight", slice(3, 7)), ours.head.norm.weight[3:7])
    ids = torch.randint(config.vocab_size, (2, min(40, config.max_position_embeddings)))
    expected = theirs(ids)[0]
    return (ours(ids) - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


def test_imports_equal_transformers_or_name_what_is_odd(tmp_path):
    logging.disable_progress_bar()
    results = []
    for seed in range(10 * len(ODDITIES)):
        folder = Folder(tmp_path / str(seed), seed)
        try:
            assert equals_transformers(folder), f"seed {seed}: {ODDITIES[seed % len(ODDITIES)]}"
            results.append("equal")
        except UserError as error:
            names = [name for name in folder.odd if name in str(error)]
            assert names and str(folder.path) in str(error), f"seed {seed}: {error}"
            results.append(names[0])
        shutil.rmtree(folder.path)
    assert len(results) >= 120
    assert results.count("equal") >= 50
    keys = {key for odd in (*GPT2_ODD, *LLAMA_ODD) for key in [*odd][:1]}
    assert {*keys, "is_causal", "tie_word_embeddings", "two tensors", "it lacks"} <= set(results)


CHOSEN = ("chosen.safetensors", "chosen.safetensors.index.json")


@pytest.mark.parametrize("chosen", [None, *CHOSEN])
def test_other_weights_in_the_folder(tmp_path, released, chosen):
    """As export.py leaves some, when transformers saves its model into the same folder; and a
    configuration that chooses."""
    names = ("older.safetensors", INDEX) if chosen is None else CHOSEN
    other_weights(released, *names)
    if chosen:
        released.configure(transformers_weights=chosen)
    assert equals_transformers(released)


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


def add_code(folder: Path, marker: Path) -> None:
    """evil.py, which leaves `marker` where it is run."""
    code = f"import os\nos.mkdir({str(marker)!r})\nfrom transformers import GPT2Config as Evil\n"
    (folder / "evil.py").write_text(code)


@pytest.mark.parametrize("model_type", ["evil", "gpt2"])
def test_code_of_a_model_is_not_run(run, config, released, monkeypatch, model_type):
    """Nor is it asked for: the answer would be taken from the prompts."""
    marker = released.path / "ran"
    add_code(released.path, marker)
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    released.configure(model_type=model_type, auto_map=auto_map)
    for words in (["train", config.path], ["sample", "--max_new_tokens", 2]):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\nab\n"))
        seen = run(*words, "--init_from", released.path)
        where = f"init_from: {released.path}: its config.json"
        refused(seen, f"{where}: auto_map names other files, whose")
        assert not seen.out
        assert not marker.exists()


def test_code_of_a_tokenizer_is_not_run(run, config, released, monkeypatch, tmp_path):
    """In a released folder, and beside the tokenizer of a checkpoint."""
    run("train", config.path, "--num_steps", 1)
    checkpoint, marker = config.out / "checkpoint_1.mdl", tmp_path / "ran"
    for folder in (released.path, checkpoint):
        add_code(folder, marker)
        keys = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
        (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    for words in (
        ("sample", "--init_from", released.path, "--max_new_tokens", 2),
        ("sample", "--checkpoint_path", checkpoint, "--max_new_tokens", 2),
        ("export", "--checkpoint_path", checkpoint, "--out", tmp_path / "exported"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\nab\n"))
        refused(run(*words), "its tokenizer_config.json: auto_map names other files, whose code is")
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


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_labels": 10**8}, "its config.json: num_labels is 1"),
        ({"n_layer": 10**9}, "its config.json: n_layer is 1"),
        ({"text_config": {"num_labels": 10**8}}, "its config.json: num_labels is 1"),
        ({"layer_norm_epsilon": "small"}, "TypeError: Field 'layer_norm_epsilon' expected float"),
    ],
)
def test_configurations_that_are_refused(run, config, released, keys, message):
    """In a process that can take 1 GB more than it has, as some claim to need much."""
    released.configure(**keys)
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for words in (["train", config.path], ["sample", "--prompt", "ab"]):
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
        try:
            seen = run(*words, "--init_from", released.path)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        refused(seen, message)


def test_a_kind_of_model_that_cannot_be_trained(run, config, released):
    released.configure(model_type="gpt_neox")
    seen = run("train", config.path, "--init_from", released.path)
    refused(seen, "its model_type is 'gpt_neox'; known are gpt2, llama, mistral, qwen2, qwen3")


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


def replaced(kind: str, pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def repeated(steps: str, step: dict, times: int) -> dict:
    return {"type": "Sequence", steps: [step] * times}


PREPEND = {"type": "Prepend", "prepend": "a" * 100}
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
EXPLODING = {  # tokenizers that make a text very long
    "text": {"normalizer": repeated("normalizers", replaced("String", "a", "aa"), 40)},
    "regex": {"normalizer": repeated("normalizers", replaced("Regex", "(?=a)", "a"), 40)},
    "prefix": {"normalizer": repeated("normalizers", PREPEND, 5)},
    "bytes": {"pre_tokenizer": repeated("pretokenizers", BYTES, 30)},
}


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
    change(released.path / "tokenizer.json", normalizer=replaced("Regex", "(a+)+$", "a"))
    flags = ["--init_from", released.path, "--prompt", "a" * 40 + "b", "--max_new_tokens", 3]
    seen = run("sample", *flags)
    *_, line = seen.err.splitlines()  # the package has written more
    assert seen.status == 1
    assert line.startswith("error: the prompt 'aaa") and "or its tokenizer is damaged: " in line
