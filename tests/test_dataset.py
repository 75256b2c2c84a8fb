import json
import os
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import VOCABULARY, figures, records, text, write_dataset
from helpers import data_config, eval_data, peak_memory_of, train_data

from common.console import UserError
from common.files import read_sealed, write_sealed
from common.shuffle import hashed, shuffled
from common.tokens import BLOCK, write_meta
from dataset import IGNORE, EvalData, TrainData


def write(folder, train: np.ndarray, val: np.ndarray, vocab_size: int, dtype: str = "uint16"):
    folder.mkdir(exist_ok=True)
    for split, ids in (("train", train), ("val", val)):
        ids.astype(dtype).tofile(folder / f"{split}.bin")
    write_meta(folder, {"vocab_size": vocab_size, "dtype": dtype})
    return folder


@pytest.fixture
def numbers(tmp_path):
    """Token i of train.bin is i."""
    return write(tmp_path / "numbers", np.arange(1003), np.arange(103), 1003)


def test_targets_are_the_next_tokens(numbers):
    batch = train_data(numbers, 1003, 10, 4).get(7)
    ids, targets = batch.ids, batch.targets
    assert ids.shape == targets.shape == (4, 10)
    assert ids.dtype == targets.dtype == np.int32
    assert (targets == ids + 1).all()
    assert batch.offsets.tolist() == ids[:, 0].tolist()


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(numbers):
    batches = train_data(numbers, 1003, 10, 9)  # 99 windows: 11 batches of 9
    epochs = np.concatenate([batches.get(step).ids[:, 0] for step in range(33)]).reshape(3, 99)
    for starts in epochs:
        assert (np.diff(np.sort(starts)) == 10).all()
    assert not np.array_equal(epochs[0], epochs[1])
    assert len({starts.min() for starts in epochs}) > 1  # the windows shift, too


def test_order_is_frozen(numbers):
    """A function of seed and step, whatever was read before. A resume under other versions must go
    on with the same data: never change these numbers."""
    batches, other = train_data(numbers, 1003, 10, 4), train_data(numbers, 1003, 10, 4, seed=1)
    for step, starts in ((30, [182, 702, 72, 242]), (0, [330, 410, 370, 720])):
        assert batches.get(step).ids[:, 0].tolist() == starts
        assert other.get(step).ids[:, 0].tolist() != starts


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_global_batch_does_not_depend_on_the_number_of_processes(numbers, size):
    train, val = train_data(numbers, 1003, 10, 8), eval_data(numbers, 1003, 10, 4)
    asked = [(train, (5,)), *((val, (first, 4)) for first in range(0, len(val), 4))]
    for data, what in asked:
        batch, parts = data.get(*what), [data.get(*what, rank, size) for rank in range(size)]
        assert np.array_equal(np.concatenate([part.ids for part in parts]), batch.ids)
        assert np.array_equal(np.concatenate([part.targets for part in parts]), batch.targets)


@pytest.mark.parametrize(("length", "batch_size"), [(10, 4), (7, 3), (102, 8), (200, 2)])
def test_evaluation_predicts_every_token_once(numbers, length, batch_size):
    data = eval_data(numbers, 1003, length, batch_size)
    batches = [data.get(first, batch_size) for first in range(0, len(data), batch_size)]
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    assert sorted(targets[targets != IGNORE]) == list(range(1, 103))
    for batch in batches:
        counted = batch.targets != IGNORE
        assert (batch.targets[counted] == batch.ids[counted] + 1).all()


def test_evaluation_of_some_batches(numbers):
    assert len(eval_data(numbers, 1003, 10, 4, eval_batches=2)) == 8
    assert len(eval_data(numbers, 1003, 10, 4, eval_batches=100)) == 11


def test_large_vocabulary(tmp_path):
    ids = np.array([0, 65536, 99999, 7])
    folder = write(tmp_path / "large", ids, ids, 100_000, "uint32")
    assert train_data(folder, 100_000, 3, 1).get(0).targets.tolist() == [[65536, 99999, 7]]


def test_one_sequence_is_enough(tmp_path):
    folder = write(tmp_path / "short", np.arange(11), np.arange(2), 11)
    assert train_data(folder, 11, 10, 2).get(3).ids.tolist() == [list(range(10))] * 2
    with pytest.raises(UserError, match="11 tokens, fewer than one sequence of 11 and the token"):
        train_data(folder, 11, 11, 2)


def written(content: bytes):
    return lambda path: path.write_bytes(content)


def flip(path):
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)


def pipe(path):
    """Opening it would wait forever."""
    path.unlink()
    os.mkfifo(path)


def script(path):
    (path / "prepare.py").touch()
    (path / "train.bin").unlink()


def larger_vocabulary(path):
    write_meta(path, {"vocab_size": 1004, "dtype": "uint16"})


MISSING = "meta.json is missing: prepare the dataset; run: python data/prepare.py"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("", shutil.rmtree, MISSING),
        ("meta.json", Path.unlink, "meta.json is missing"),
        ("meta.json", written(b"{"), "meta.json is damaged"),
        ("meta.json", written(b"[]"), "meta.json is damaged"),
        ("meta.json", written(b"{}"), "meta.json is damaged"),
        ("train.bin", Path.unlink, "train.bin is missing"),
        ("train.bin", written(b"abc"), "3 bytes, and meta.json says"),
        ("train.bin", pipe, "train.bin is not a file; run: python"),
        ("train.crc", Path.unlink, "train.crc is missing"),
        ("train.crc", written(b"abc"), "train.crc was changed"),
        ("", script, r"train.bin is missing.*run: python .*numbers/prepare.py"),
        ("", larger_vocabulary, "1,004 token ids, the model's vocab_size is 1,003"),
    ],
)
def test_damaged_datasets(numbers, name, damage, message):
    damage(numbers / name)
    with pytest.raises(UserError, match=message):
        train_data(numbers, 1003, 10, 4)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00001.bin", Path.unlink, "train-00001.bin is missing"),
        ("train-00001.crc", Path.unlink, "train-00001.crc is missing"),
        ("train-00001.bin", written(b"abcd"), "train-00001.bin has 4 bytes"),
        ("train-00003.bin", Path.touch, "train-00003.bin is a shard too many"),
        ("train.bin", Path.touch, "train.bin is a shard too many: meta.json names 3"),
        ("train-00002.bin", flip, "train-00002.bin was changed between bytes 0 and"),
        ("train-00002.crc", flip, "train-00002.crc was changed"),
    ],
)
def test_damaged_shards(numbers, name, damage, message):
    split_up(numbers, "train", [400, 300])
    damage(numbers / name)
    with pytest.raises(UserError, match=message):
        train_data(numbers, 1003, 10, 4).tokens.read(0, 1003)


def test_token_above_what_meta_says(numbers):
    write_meta(numbers, {"vocab_size": VOCABULARY, "dtype": "uint16"})
    with pytest.raises(UserError, match=r"train.bin has token id \d+ .* below 27"):
        train_data(numbers, VOCABULARY, 100, 4).get(0)


def test_file_cut_off_while_training(numbers):
    batches = train_data(numbers, 1003, 10, 4)
    with open(numbers / "train.bin", "r+b") as file:
        file.truncate(777)
    with pytest.raises(UserError, match="ends early"):
        batches.get(0)


@pytest.mark.parametrize("sizes", [range(1, 300), range(4990, 5001)])
def test_an_order_has_each_window_once(sizes):
    for size in sizes:
        order = shuffled(np.arange(size), size, hashed(1, size))
        assert np.array_equal(np.sort(order), np.arange(size)), size


@pytest.mark.long
def test_an_order_has_each_window_once_at_every_size():
    test_an_order_has_each_window_once(range(300, 4990))


def test_an_order_of_a_billion_windows():
    """A sample of places has as many windows, spread evenly, and neighbours part."""
    size, places = 10**9, np.arange(123_456_789, 123_456_789 + 200_000)
    order = shuffled(places, size, hashed(0, 0))
    assert len(np.unique(order)) == len(places) and order.min() >= 0 and order.max() < size
    assert chi_square(np.bincount(order * 1000 // size, minlength=1000)) < 1150
    steps = np.diff(order)
    assert (np.abs(steps) < size // 1000).mean() < 0.003
    assert chi_square(np.bincount(steps % size * 1000 // size, minlength=1000)) < 1150


@pytest.mark.parametrize("size", [2, 3, 5, 7, 30, 1000])
def test_orders_of_epochs_and_seeds_are_independent(size):
    """Every element is equally likely at every place, and after every element of another epoch."""
    keys = hashed(3, np.arange(40 * size), 1)
    for place in (0, size - 1):
        found = shuffled(np.full(len(keys), place), size, keys)
        assert chi_square(np.bincount(found, minlength=size)) < size + 6 * (2 * size) ** 0.5 + 6
        steps = np.diff(found) % size
        assert chi_square(np.bincount(steps, minlength=size)) < size + 6 * (2 * size) ** 0.5 + 6


def chi_square(counts: np.ndarray) -> float:
    mean = counts.sum() / len(counts)
    return ((counts - mean) ** 2 / mean).sum()


def split_up(folder, split: str, sizes: list[int], dtype: str = "uint16"):
    """The same tokens in shards of these sizes."""
    ids = np.fromfile(folder / f"{split}.bin", dtype)
    (folder / f"{split}.bin").unlink()
    (folder / f"{split}.crc").unlink()
    for i, part in enumerate(np.split(ids, np.cumsum(sizes))):
        part.tofile(folder / f"{split}-{i:05}.bin")
    meta = read_sealed(folder / "meta.json")
    write_meta(folder, {key: meta[key] for key in ("vocab_size", "dtype")})


def test_shards_are_read_as_one_row_of_tokens(numbers, tmp_path):
    sharded = shutil.copytree(numbers, tmp_path / "sharded")
    split_up(sharded, "train", [400, 1, 2])
    split_up(sharded, "val", [50])
    one, many = (train_data(d, 1003, 10, 4) for d in (numbers, sharded))
    for step in range(60):
        assert np.array_equal(one.get(step).ids, many.get(step).ids)
    assert np.array_equal(many.tokens.read(0, 1003), np.arange(1003))
    first, second = (eval_data(d, 1003, 10, 4).get(0, 11) for d in (numbers, sharded))
    assert np.array_equal(first.targets, second.targets)


@pytest.mark.parametrize(("tokens", "dtype"), [(3e11, "uint16"), (2e12, "uint32")])
def test_trillions_of_tokens(tmp_path, tokens, dtype):
    """Open and first batch on any rank take little time and memory; the files are sparse."""
    shard, size = 10**9, np.dtype(dtype).itemsize
    blocks = shard * size // BLOCK
    sums = [zlib.crc32(bytes(BLOCK))] * blocks + [zlib.crc32(bytes(shard * size % BLOCK))]
    (tmp_path / "sums").write_bytes(np.array(sums, "<u4").tobytes())
    checksum, count = zlib.crc32((tmp_path / "sums").read_bytes()), int(tokens) // shard
    for name in [*(f"train-{i:05}" for i in range(count)), "val"]:
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(shard * size)
        os.link(tmp_path / "sums", tmp_path / f"{name}.crc")
    meta = {"vocab_size": 50257, "dtype": dtype}
    meta["shards"] = {"train": [[shard, checksum]] * count, "val": [[shard, checksum]]}
    meta["tokens"] = {"train": shard * count, "val": shard}
    write_sealed(tmp_path / "meta.json", meta)
    config = data_config(tmp_path, 50257, 2048, 256)
    offsets = []
    for rank in (0, 15):
        began = time.process_time()
        with peak_memory_of() as peak:
            data = TrainData(config)
            EvalData(config, config.dataset)
            batch = data.get(0, rank, 16)
            first = time.process_time() - began
            data.get(int(tokens) // 2048 // 256 // 2, rank, 16)
        assert first < 2 and time.process_time() - began - first < 2 and peak.grown < 300e6
        offsets.append(batch.offsets.tolist())
    assert offsets[0] == offsets[1]


@pytest.fixture
def mixture(tmp_path) -> dict:
    """Token i of web is i, that of code 5,000 + i."""
    for name, begin, count in (("web", 0, 1003), ("code", 5000, 303)):
        ids = np.arange(begin, begin + count)
        write(tmp_path / name, ids, ids[:43], 6000)
    return {str(tmp_path / "web"): 0.7, str(tmp_path / "code"): 0.3}


def test_the_shares_of_a_mixture_are_exact(mixture):
    data = train_data(mixture, 6000, 10, 7, seed=1)
    starts = np.concatenate([data.get(step).ids[:, 0] for step in range(400)])
    of_code = np.cumsum(starts >= 5000)
    assert np.abs(of_code - 0.3 * np.arange(1, 2801)).max() < 1
    for source, windows in ((starts[starts < 5000], 99), (starts[starts >= 5000], 29)):
        for epoch in np.split(source[: len(source) // windows * windows], len(source) // windows):
            assert (np.diff(np.sort(epoch)) == 10).all()  # each has epochs of its own
    ids = data.get(3).ids
    assert np.array_equal(ids, np.concatenate([data.get(3, r, 3).ids for r in range(3)]))
    offsets = data.get(3).offsets
    assert np.array_equal(ids[:, 0], np.where(offsets < 1003, offsets, offsets + 5000 - 1003))


@pytest.mark.parametrize("shares", [(1, 1), (0.6, 0.22, 0.08, 0.08, 0.03), (1, 1e-6), (1, 2, 3, 4)])
def test_shares_by_count(mixture, shares):
    """Over any stretch, at the start of a run and late in it, in any parts."""
    data = train_data(mixture, 6000, 10, 7, seed=1)
    data.shares = [share / sum(shares) for share in shares]
    for first in (0, 10**10):
        of, numbers = data.mixed(first, 20_000)
        parts = [data.mixed(first + begin, 123)[0] for begin in range(0, 12_300, 123)]
        assert np.array_equal(np.concatenate(parts), of[:12_300])
        for i, share in enumerate(data.shares):
            found = numbers[of == i]
            assert np.array_equal(found, np.arange(len(found)) + (found[0] if len(found) else 0))
            counted = np.cumsum(of == i) - share * np.arange(1, 20_001)
            assert counted.max() - counted.min() < 2.5
            assert first or np.abs(counted).max() < 1.5


@pytest.fixture
def mixed(tmp_path) -> str:
    """The value of --dataset: two folders with one tokenizer."""
    web = write_dataset(tmp_path / "web", text(1, 2000), text(1, 301))
    code = write_dataset(tmp_path / "code", text(2, 2000), text(2, 201))
    return f"{{{web}: 0.7, {code}: 0.3}}"


@pytest.mark.long
def test_engines_train_alike_on_a_mixture_and_resume(run, config, mixed, tmp_path):
    """Losses of each engine, with any processes, and after a resume at any step."""
    flags = ["--dataset", mixed, "--eval_steps", 3, "--checkpoint_steps", 1]
    train = ["train", config.path, *flags]
    shown = run(*train, "--engine", "resident").out
    expected = figures(config.out)
    each = [r for r in records(config.out, "val_loss")][-1]
    folders = [tmp_path / "web", tmp_path / "code"]
    names = [f"val_loss/{folder}" for folder in folders]
    lengths = [read_sealed(f / "meta.json")["tokens"]["val"] - 1 for f in folders]
    total = sum(each[name] * length for name, length in zip(names, lengths, strict=True))
    assert each["val_loss"] == pytest.approx(total / sum(lengths), rel=1e-5)
    assert f"| {tmp_path / 'code'} {each[names[1]]:.4f}\n" in shown
    for number, more in enumerate((["--engine", "streaming"], ["--num_systems", 2])):
        out = tmp_path / f"other{number}"
        assert run(*train, *more, "--out_dir", out).status == 0
        for record, known in zip(figures(out), expected, strict=True):
            assert all(record[key] == pytest.approx(known[key], rel=1e-4) for key in known)
    for step in (1, 4):
        out = tmp_path / f"resumed{step}"
        checkpoint = config.out / f"checkpoint_{step}.mdl"
        more = ["--out_dir", out, "--checkpoint_path", checkpoint]
        assert run(*train, "--engine", "resident", *more).status == 0
        assert figures(out)[-2:] == expected[-2:]
    seen = run("eval", config.path, "--dataset", mixed, "--checkpoint_path", config.out, "--json")
    result = json.loads(seen.out)
    assert result["loss"] == pytest.approx(each["val_loss"], rel=1e-5)
    assert result[f"loss/{tmp_path / 'web'}"] == pytest.approx(each[names[0]], rel=1e-5)


def test_mixtures_that_are_refused(run, config, mixed, tmp_path):
    web, code = (tmp_path / name for name in ("web", "code"))
    other = write_dataset(tmp_path / "other", text(1, 400) + "XYZ", text(1, 301))
    wide = shutil.copytree(web, tmp_path / "wide")
    for split in ("train", "val"):
        np.fromfile(wide / f"{split}.bin", "uint16").astype("uint32").tofile(wide / f"{split}.bin")
    meta = read_sealed(wide / "meta.json")
    write_meta(wide, meta | {"dtype": "uint32"})
    for value, message in (
        (f"{{{web}: 0.7, {code}: 0}}", "dataset: {"),
        (f"{{{web}: 0.7, {code}: -1}}", "greater than or equal to"),
        (f"{{{web}: 0.7, {code}: .inf}}", "valid number"),
        (f"{{{web}: much}}", "valid number"),
        ("{}", "dataset: {}"),
        (f"{{{web}: 1, {tmp_path}/nowhere: 1}}", "nowhere/meta.json is missing"),
        (f"{{{web}: 1, {other}: 1}}", f"{other} and {web} differ in tokenizer_sha256: prepare"),
        (f"{{{web}: 1, {wide}: 1}}", f"{wide} and {web} differ in dtype: prepare both"),
    ):
        seen = run("train", config.path, "--dataset", value, "--vocab_size", 32)
        assert seen.status == 1
        assert message in seen.err.splitlines()[-1]


def test_the_plan_counts_epochs(run, config, mixed):
    """How often each source is seen, and a warning where it is often."""
    seen = run("plan", config.path, "--dataset", mixed, "--num_steps", 500)
    names = [Path(part.split(":")[0].strip(" {")) for part in mixed.split(",")]
    sizes = [read_sealed(name / "meta.json")["tokens"]["train"] for name in names]
    often = [500 * 4 * 32 * share / size for share, size in zip((0.7, 0.3), sizes, strict=True)]
    assert f"epochs: {often[0]:.3g} of {names[0]}, {often[1]:.3g} of {names[1]}\n" in seen.out
    assert "is seen" not in seen.err
    seen = run("plan", config.path, "--dataset", mixed.replace("0.7", "3.5"), "--num_steps", 1000)
    assert f"warning: {names[0]} is seen " in seen.err
    assert f"{names[1]} is seen" not in seen.err
