import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from common.console import UserError
from configuration import Cluster, Configuration
from engines.optimizer import learning_rate
from planner.costs import count
from planner.machine import parse_bytes
from runtime.arguments import OTHER_NAMES, parse_configuration, write_configuration

ROOT = Path(__file__).resolve().parents[1]
TABLE = {  # parameters, depth, width, heads, learning rate, sequence length, batch size
    "111m": (111_050_496, 10, 768, 12, 6.0e-4, 2048, 120),
    "256m": (255_977_024, 14, 1088, 17, 6.0e-4, 2048, 264),
    "590m": (590_310_912, 18, 1536, 12, 2.0e-4, 2048, 264),
    "1p3b": (1_315_723_264, 24, 2048, 16, 2.0e-4, 2048, 528),
    "2p7b": (2_651_553_280, 32, 2560, 32, 2.0e-4, 2048, 528),
    "6p7b": (6_658_404_352, 32, 4096, 32, 1.2e-4, 2048, 1040),
    "13b": (12_853_386_240, 40, 5120, 40, 1.2e-4, 2048, 1080),
    "70b": (64_861_528_064, 80, 8192, 64, 1.0e-6, 2048, 1472),
    "175b": (174_604_259_328, 96, 12288, 96, 5.0e-6, 2048, 1472),
}
LLAMAS = {  # parameters as their model cards count them, depth, width, heads, kv_heads
    "smollm2_135m": (134_515_008, 30, 576, 9, 3),
    "smollm2_1p7b": (1_711_376_384, 24, 2048, 32, 32),
    "tinyllama_1p1b": (1_100_048_384, 22, 2048, 32, 4),
    "llama3p1_8b": (8_030_261_248, 32, 4096, 32, 8),
    "llama3p1_70b": (70_553_706_496, 80, 8192, 64, 8),
}
DEFAULTS = asdict(Cluster())


@pytest.fixture
def parse(monkeypatch):
    def parse(*arguments: str) -> Configuration:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return parse_configuration("")[0]

    return parse


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name, parse):
    config = parse(str(ROOT / f"configs/{name}.yaml"))
    shape = (config.depth, config.width, config.heads)
    run = (config.learning_rate, config.sequence_length, config.batch_size)
    assert (count(config), *shape, *run) == TABLE[name]
    assert config.out_dir == "model_dir"
    assert config.dataset == "data/openwebtext"


@pytest.mark.parametrize("name", LLAMAS)
def test_llamas(name, parse):
    config = parse(str(ROOT / f"configs/{name}.yaml"))
    shape = (config.depth, config.width, config.heads, config.kv_heads)
    assert (count(config), *shape) == LLAMAS[name]
    tokens = config.num_steps * config.batch_size * config.sequence_length
    assert tokens == pytest.approx(20 * count(config), rel=1e-3)


def test_every_configuration_is_listed_and_has_no_placeholder():
    paths = list(ROOT.glob("configs/*.yaml"))
    assert {path.stem for path in paths} == {"demo", "finetune", *TABLE, *LLAMAS}
    assert not any("/path/to" in path.read_text() for path in paths)


def test_command_line_overrides_the_file(parse, config):
    got = parse(config.path, "--batch_size", "8", "--learning_rate", "6e-4", "--bias", "false")
    assert (got.batch_size, got.learning_rate, got.bias, got.width) == (8, 6e-4, False, 32)
    assert parse(config.path, "--bias", "False").bias is False
    assert parse(config.path, "--batch_size=16").batch_size == 16


def test_a_number_like_6e_4_in_a_file_is_a_number(parse, config):
    Path(config.path).write_text("learning_rate: 6e-4\nadam_epsilon: 1e-9\nvocab_size: 27\n")
    got = parse(config.path)
    assert (got.learning_rate, got.adam_epsilon) == (6e-4, 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ([f"--{theirs}", "1"], f"--{theirs} is not a known key; did you mean {ours}")
            for theirs, ours in OTHER_NAMES.items()  # those of nanoGPT
        ),
        (["--batchsize", "8"], "--batchsize is not a known key; did you mean batch_size?"),
        (["--batch", "8"], "--batch is not a known key; did you mean batch_size?"),
        (["--widht=8"], "--widht is not a known key; did you mean width?"),
        (["--batch_size", "many"], "batch_size: 'many' should be a valid integer"),
        (["--batch_size", "1.5"], "batch_size: '1.5' should be a valid integer"),
        (["--bias", "maybe"], "bias: .*maybe"),
        (["--activation", "relu"], "activation: 'relu' should be 'gelu', 'gelu_new' or 'swig"),
        (["--backend", "TPU"], "backend: 'TPU' should be 'auto', 'CPU', 'GPU' or 'CSX'"),
        (["--heads", "5"], "heads: 5 does not divide width 32"),
        (["--sequence_length", "33"], "sequence_length: 33 is above max_position_embeddings 32"),
        (["--batch_size", "0"], "batch_size: '0' should be greater than 0"),
        (["--learning_rate", ".nan"], "learning_rate: '.nan' should be a valid number"),
        (["--init_std", "-1"], r"init_std: -1.0 is not in \[0, inf\)"),
        (["--seed", "5000000000"], "seed: '5000000000' should be less than 4294967296"),
        (["--warmup_steps", "-1"], "warmup_steps: '-1' should be greater than or equal to 0"),
        (["--batch_size", "0x10"], "batch_size: '0x10' should be a valid integer"),
        (["--batch_size", "1:30"], "batch_size: '1:30' should be a valid integer"),
        (["--batch_size", "1000000000"], "batch_size: '1000000000' should be less than or equal"),
        (["--batch_size", f"{2**63 - 1}"], f"batch_size: '{2**63 - 1}' should be less than or"),
        (["--step_timeout", f"{2**63 - 1}"], f"step_timeout: '{2**63 - 1}' should be less than"),
        (["--adam_epsilon", "1e-320"], "adam_epsilon: '1e-320' should be greater than or equal to"),
        (["--learning_rate", "1e39"], "learning_rate: '1e39' should be less than 17"),
        (["--sample_prompts", "The ship"], "sample_prompts: 'The ship' should be a valid list"),
        (["--sample_prompts", "['']"], "sample_prompts: .* should be printable text"),
        (["stray"], "stray"),
        (["--cluster.mgmt", "a:1"], "--cluster.mgmt is not a known key; did you mean cluster"),
        (["--mount_dirs", "/x"], "--mount_dirs is not a known key; did you mean cluster.mount"),
        (["--cluster.job_time_sec", "soon"], "cluster.job_time_sec: "),
        (["--cluster.max_wgt_servers", "-5"], "cluster.max_wgt_servers: '-5' should be greater th"),
    ],
)
def test_wrong_arguments(parse, config, arguments, message):
    with pytest.raises(UserError, match=message):
        parse(config.path, *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("widht: 8", "widht is not a known key; did you mean width?"),
        ("width: [1", "is not a configuration: while parsing a flow sequence"),
        ("just words", "is not a configuration"),
        ("", "is not a configuration"),
        ("width: wide", "width: 'wide' should be a valid integer"),
        ("!!python/object/apply:os.getcwd []", r"a text that begins with \*, & or ! needs quotes"),
        (
            "dataset: &data words\nout_dir: *data",
            r"a text that begins with \*, & or ! needs quotes",
        ),
        ("#" * 2**16 + "\n", "is not a configuration: it has more than 65,536 bytes"),
        ("width: 32\ndepth: 2\nwidth: 64", "the key 'width' is there twice; remove one"),
        ("cluster: {job_priority: p1, job_priority: p2}", "the key 'job_priority' is there twice"),
        ("cluster.job_priority: p1\ncluster: {job_priority: p2}", "'cluster.job_priority' is th"),
        ("cluster: {}\ncluster: {job_priority: p2}\ncluster.job_priority: p1", "is there twice"),
        ("batch_size: 1:30", "batch_size: '1:30' should be a valid integer"),
        ("batch_size: 0x10", "batch_size: '0x10' should be a valid integer"),
        ("learning_rate: 1:30.5", "learning_rate: '1:30.5' should be a valid number"),
        ("out_dir: ''", "out_dir: None should be a valid string"),
        (
            "vocab_size: 27\ncluster: {validate_only: true, compile_only: true}",
            "cluster.validate_only and cluster.compile_only: use one of them",
        ),
        ("cluster: {address: a}", "cluster.address is not a known key; did you mean cluster."),
        ("cluster: [a]", "cluster is a section, with lines such as"),
        ("mount_dirs: [a]", "mount_dirs is not a known key; did you mean cluster.mount_dirs?"),
    ],
)
def test_wrong_files(parse, tmp_path, content, message):
    (tmp_path / "wrong.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        parse(str(tmp_path / "wrong.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the first argument is a configuration"),
        (["--width", "8"], "the first argument is a configuration"),
        (["nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    ],
)
def test_no_file(run, arguments, message):
    """As a user sees it."""
    seen = run("train", *arguments)
    assert seen.status == 1
    assert seen.err.startswith(f"error: {message}") and seen.err.count("\n") == 1


def test_learning_rate_schedule():
    config = Configuration(learning_rate=1.0, warmup_steps=10, num_steps=110)
    rates = [learning_rate(config, step) for step in (1, 5, 10, 60, 110, 500)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 0.55, 0.1, 0.1])
    outlasting = Configuration(learning_rate=1.0, warmup_steps=1000, num_steps=3)
    assert learning_rate(outlasting, 3) == pytest.approx(0.003)


def test_decay_follows_an_overridden_num_steps(parse, config):
    """The original kept the decay_steps of the file's num_steps."""
    got = parse(config.path, "--num_steps", "50", "--learning_rate", "1.0")
    assert learning_rate(got, 50) == pytest.approx(0.1)
    assert learning_rate(got, 26) == pytest.approx(0.55)
    longer = parse(config.path, "--num_steps", "50", "--decay_steps", "96", "--learning_rate", "1")
    assert learning_rate(longer, 50) == pytest.approx(0.55)


def test_sizes():
    for size, number in (("20GB", 20e9), ("1.5TB", 1.5e12), ("2GiB", 2**31)):
        assert parse_bytes(size, "memory_limit") == number
    for size in ("lots", "20", "GB", "-1GB", "1.2.3GB", "20gigs", "9" * 500 + "GB"):
        with pytest.raises(UserError, match="is not a size such as 20GB"):
            parse_bytes(size, "disk")


def test_the_cluster_is_a_section(parse, config):
    """Of the file, of the command line, and of the file that a run writes."""
    with open(config.path, "a") as file:
        file.write("cluster:\n  mgmt_address: host:9000\n  mount_dirs: [/data, /code]\n")
    others = ["--adam_epsilon", "1e-9", "--memory_limit", "20GB"]
    flags = ["--cluster.job_priority", "p1", "--cluster.validate_only", "true", *others]
    got = parse(config.path, *flags)
    expected = {"mgmt_address": "host:9000", "mount_dirs": ["/data", "/code"], "job_priority": "p1"}
    for key, value in asdict(got.cluster).items():
        assert value == expected.get(key, True if key == "validate_only" else DEFAULTS[key]), key
    again = Path(config.path).with_name("again.yaml")
    write_configuration(got, got, again)
    assert parse(str(again)) == got
    other = parse(str(again), "--cluster.mgmt_address", "other:1")
    assert other.cluster.mount_dirs == ["/data", "/code"]
    Path(config.path).write_text("vocab_size: 27\ncluster:\n")
    assert asdict(parse(config.path).cluster) == DEFAULTS
    assert not any(DEFAULTS.values())


TEXTS = ["ROMEO:", "A king", "2024", "0777", "1:30", "null", "no", "A: b", "2001-01-01", "[a]"]


def test_texts_are_texts_whatever_they_look_like(parse, config):
    """On the command line, in a list in brackets and in one of lines; a comment is none."""
    assert parse(config.path, "--sample_prompts", f"[{', '.join(TEXTS)}]").sample_prompts == TEXTS
    with open(config.path, "a") as file:
        file.write("memory_limit: 1:30  # a comment\ncluster:\n  job_priority: 0777\n")
        file.write("sample_prompts:\n" + "".join(f"- {text}  # a comment\n" for text in TEXTS))
    got = parse(config.path, "--out_dir", "a: [b", "--stream_dir", "#2", "--profile", "2:4")
    assert got.sample_prompts == TEXTS
    assert (got.memory_limit, got.cluster.job_priority) == ("1:30", "0777")
    assert (got.out_dir, got.stream_dir, got.profile) == ("a: [b", "#2", "2:4")
    assert parse(config.path, "--memory_limit", "null").memory_limit is None


def test_numbers_are_written_as_numbers(parse, config):
    numbers = {"0": 0.0, "-0": 0.0, "+1": 1.0, ".5": 0.5, "5.": 5.0, "5.0e-1": 0.5, "1E+2": 100.0}
    for written, number in numbers.items():
        assert parse(config.path, "--weight_decay", written).weight_decay == number
