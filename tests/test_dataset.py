import os
import shutil

import numpy as np
import pytest
from conftest import VOCABULARY

from dataset import IGNORE, EvalBatches, Tokens, TrainBatches, write_meta
from errors import UserError


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
    ids, targets = TrainBatches(numbers, 1003, 10, 4, seed=0)[7]
    assert ids.shape == targets.shape == (4, 10)
    assert ids.dtype == targets.dtype == np.int64
    assert (targets == ids + 1).all()


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(numbers):
    batches = TrainBatches(numbers, 1003, 10, 9, seed=0)  # 99 windows: 11 batches of 9
    epochs = [
        np.concatenate([batches[step][0][:, 0] for step in range(11 * e, 11 * e + 11)])
        for e in range(3)
    ]
    for starts in epochs:
        assert (np.diff(np.sort(starts)) == 10).all()
    assert not np.array_equal(epochs[0], epochs[1])
    assert len({starts.min() for starts in epochs}) > 1  # the windows shift, too


def test_order_is_a_function_of_seed_and_step(numbers):
    batches = [TrainBatches(numbers, 1003, 10, 8, seed=s) for s in (3, 3, 4)]
    for step in (40, 0, 13):  # any order, across epochs
        assert np.array_equal(batches[0][step][0], batches[1][step][0])
        assert not np.array_equal(batches[0][step][0], batches[2][step][0])


def test_order_is_frozen(numbers):
    """A resume under other versions must go on with the same data: never change these numbers."""
    batches = TrainBatches(numbers, 1003, 10, 4, seed=0)
    assert batches[0][0][:, 0].tolist() == [779, 359, 859, 319]
    assert batches[30][0][:, 0].tolist() == [957, 947, 37, 367]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_global_batch_does_not_depend_on_the_number_of_systems(numbers, world):
    whole = TrainBatches(numbers, 1003, 10, 8, seed=0)[5]
    parts = [TrainBatches(numbers, 1003, 10, 8, 0, rank, world)[5] for rank in range(world)]
    for i in range(2):
        assert np.array_equal(np.concatenate([part[i] for part in parts]), whole[i])
    val = EvalBatches(numbers, 1003, 10, 4)
    for step in range(len(val)):
        parts = [EvalBatches(numbers, 1003, 10, 4, None, r, world)[step] for r in range(world)]
        assert np.array_equal(np.concatenate([part[0] for part in parts]), val[step][0])


@pytest.mark.parametrize(("length", "batch_size"), [(10, 4), (7, 3), (102, 8), (200, 2)])
def test_evaluation_predicts_every_token_once(numbers, length, batch_size):
    batches = list(EvalBatches(numbers, 1003, length, batch_size))
    targets = np.concatenate([batch[1].ravel() for batch in batches])
    assert sorted(targets[targets != IGNORE]) == list(range(1, 103))
    for ids, following in batches:
        counted = following != IGNORE
        assert (following[counted] == ids[counted] + 1).all()


def test_evaluation_of_some_batches(numbers):
    assert len(EvalBatches(numbers, 1003, 10, 4, batches=2)) == 2
    assert len(EvalBatches(numbers, 1003, 10, 4, batches=100)) == 3


def test_large_vocabulary(tmp_path):
    ids = np.array([0, 65536, 99999, 7])
    folder = write(tmp_path / "large", ids, ids, 100_000, "uint32")
    assert TrainBatches(folder, 100_000, 3, 1, seed=0)[0][1].tolist() == [[65536, 99999, 7]]


def test_one_sequence_is_enough(tmp_path):
    folder = write(tmp_path / "short", np.arange(11), np.arange(2), 11)
    assert TrainBatches(folder, 11, 10, 2, seed=0)[3][0].tolist() == [list(range(10))] * 2
    with pytest.raises(UserError, match="11 tokens, fewer than one sequence of 11 and the token"):
        TrainBatches(folder, 11, 11, 2, seed=0)


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
        (lambda d: (d / "train.bin").write_bytes(b"abc"), "3 bytes where meta.json says"),
    ],
)
def test_damaged_datasets(numbers, damage, message):
    damage(numbers)
    with pytest.raises(UserError, match=message):
        TrainBatches(str(numbers), 1003, 10, 4, seed=0)


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
        TrainBatches(str(numbers), 1003, 10, 4, seed=0)


def test_vocabulary_above_the_models(numbers):
    with pytest.raises(UserError, match="1,003 token ids, the model's vocab_size is 512"):
        TrainBatches(numbers, 512, 10, 4, seed=0)


def test_token_above_what_meta_says(numbers):
    write_meta(numbers, {"vocab_size": VOCABULARY, "dtype": "uint16"})
    with pytest.raises(UserError, match=r"train.bin holds token id \d+ .* below 27"):
        TrainBatches(numbers, VOCABULARY, 100, 4, seed=0)[0]


def test_file_cut_off_while_training(numbers):
    batches = TrainBatches(numbers, 1003, 10, 4, seed=0)
    with open(numbers / "train.bin", "r+b") as file:
        file.truncate(777)
    with pytest.raises(UserError, match="ends early"):
        batches[0]
