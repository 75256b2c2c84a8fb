import os
import shutil

import numpy as np
import pytest
from conftest import VOCABULARY

from dataset import IGNORE, EvalData, TrainData
from runtime.console import UserError
from runtime.tokens import Tokens, write_meta


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
    batch = TrainData(numbers, 1003, 10, 4, seed=0).get(7)
    ids, targets = batch.ids, batch.targets
    assert ids.shape == targets.shape == (4, 10)
    assert ids.dtype == targets.dtype == np.int64
    assert (targets == ids + 1).all()
    assert batch.offsets == ids[:, 0].tolist()


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(numbers):
    batches = TrainData(numbers, 1003, 10, 9, seed=0)  # 99 windows: 11 batches of 9
    epochs = [
        np.concatenate([batches.get(step).ids[:, 0] for step in range(11 * e, 11 * e + 11)])
        for e in range(3)
    ]
    for starts in epochs:
        assert (np.diff(np.sort(starts)) == 10).all()
    assert not np.array_equal(epochs[0], epochs[1])
    assert len({starts.min() for starts in epochs}) > 1  # the windows shift, too


def test_order_is_a_function_of_seed_and_step(numbers):
    batches = [TrainData(numbers, 1003, 10, 8, seed=s) for s in (3, 3, 4)]
    for step in (40, 0, 13):  # any order, across epochs
        assert np.array_equal(batches[0].get(step).ids, batches[1].get(step).ids)
        assert not np.array_equal(batches[0].get(step).ids, batches[2].get(step).ids)


def test_order_is_frozen(numbers):
    """A resume under other versions must go on with the same data: never change these numbers."""
    batches = TrainData(numbers, 1003, 10, 4, seed=0)
    assert batches.get(0).ids[:, 0].tolist() == [779, 359, 859, 319]
    assert batches.get(30).ids[:, 0].tolist() == [957, 947, 37, 367]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_global_batch_does_not_depend_on_the_number_of_processes(numbers, size):
    train, val = TrainData(numbers, 1003, 10, 8, seed=0), EvalData(numbers, 1003, 10, 4)
    asked = [(train, (5,)), *((val, (first, 4)) for first in range(0, len(val), 4))]
    for data, what in asked:
        batch, parts = data.get(*what), [data.get(*what, rank, size) for rank in range(size)]
        assert np.array_equal(np.concatenate([part.ids for part in parts]), batch.ids)
        assert np.array_equal(np.concatenate([part.targets for part in parts]), batch.targets)


@pytest.mark.parametrize(("length", "batch_size"), [(10, 4), (7, 3), (102, 8), (200, 2)])
def test_evaluation_predicts_every_token_once(numbers, length, batch_size):
    data = EvalData(numbers, 1003, length, batch_size)
    batches = [data.get(first, batch_size) for first in range(0, len(data), batch_size)]
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    assert sorted(targets[targets != IGNORE]) == list(range(1, 103))
    for batch in batches:
        counted = batch.targets != IGNORE
        assert (batch.targets[counted] == batch.ids[counted] + 1).all()


def test_evaluation_of_some_batches(numbers):
    assert len(EvalData(numbers, 1003, 10, 4, batches=2)) == 8
    assert len(EvalData(numbers, 1003, 10, 4, batches=100)) == 11


def test_large_vocabulary(tmp_path):
    ids = np.array([0, 65536, 99999, 7])
    folder = write(tmp_path / "large", ids, ids, 100_000, "uint32")
    assert TrainData(folder, 100_000, 3, 1, seed=0).get(0).targets.tolist() == [[65536, 99999, 7]]


def test_one_sequence_is_enough(tmp_path):
    folder = write(tmp_path / "short", np.arange(11), np.arange(2), 11)
    assert TrainData(folder, 11, 10, 2, seed=0).get(3).ids.tolist() == [list(range(10))] * 2
    with pytest.raises(UserError, match="11 tokens, fewer than one sequence of 11 and the token"):
        TrainData(folder, 11, 11, 2, seed=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: shutil.rmtree(d),
            "meta.json is missing: prepare the dataset; run: python data/prepare.py",
        ),
        (lambda d: (d / "meta.json").unlink(), "meta.json is missing"),
        (lambda d: (d / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda d: (d / "meta.json").write_text("[]"), "meta.json is damaged"),
        (lambda d: (d / "meta.json").write_text("{}"), "meta.json is damaged"),
        (lambda d: (d / "train.bin").unlink(), "train.bin is missing"),
        (lambda d: (d / "train.bin").write_bytes(b"abc"), "3 bytes, and meta.json says"),
    ],
)
def test_damaged_datasets(numbers, damage, message):
    damage(numbers)
    with pytest.raises(UserError, match=message):
        TrainData(str(numbers), 1003, 10, 4, seed=0)


def test_a_pipe_is_no_dataset(numbers):
    """Opening it would wait forever."""
    (numbers / "train.bin").unlink()
    os.mkfifo(numbers / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin is not a file; run: python"):
        Tokens(str(numbers), "train", 1000)


def test_named_datasets_name_their_own_script(numbers):
    (numbers / "prepare.py").touch()
    (numbers / "train.bin").unlink()
    with pytest.raises(UserError, match=r"run: python .*numbers/prepare.py"):
        TrainData(str(numbers), 1003, 10, 4, seed=0)


def test_vocabulary_above_the_models(numbers):
    with pytest.raises(UserError, match="1,003 token ids, the model's vocab_size is 512"):
        TrainData(numbers, 512, 10, 4, seed=0)


def test_token_above_what_meta_says(numbers):
    write_meta(numbers, {"vocab_size": VOCABULARY, "dtype": "uint16"})
    with pytest.raises(UserError, match=r"train.bin has token id \d+ .* below 27"):
        TrainData(numbers, VOCABULARY, 100, 4, seed=0).get(0)


def test_file_cut_off_while_training(numbers):
    batches = TrainData(numbers, 1003, 10, 4, seed=0)
    with open(numbers / "train.bin", "r+b") as file:
        file.truncate(777)
    with pytest.raises(UserError, match="ends early"):
        batches.get(0)
