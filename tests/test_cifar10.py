"""The reader of CIFAR-10: Python 2's own files, damaged ones, and ones with code in them."""

import os
import pickle
import struct

import cifar10
import numpy as np
import pytest

NAMES = (*cifar10.TRAIN, *cifar10.TEST)


def python2_pickle(data, labels):
    """The bytes of a file of CIFAR-10: protocol 2, Python 2's strings, NumPy's old names."""

    def string(content):
        return b"T" + struct.pack("<i", len(content)) + content

    def number(value):
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + string(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    array += number(0) + b"\x85" + string(b"b") + b"\x87R"
    array += b"(" + number(1) + b"(" + b"".join(map(number, data.shape)) + b"t"
    array += dtype + b"\x89" + string(data.tobytes()) + b"tb"
    items = string(b"batch_label") + string(b"one of five")
    items += string(b"labels") + b"](" + b"".join(map(number, labels)) + b"e"
    items += string(b"data") + array
    return b"\x80\x02}(" + items + b"u."


def batch(seed, count=4):
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    return data, random.integers(0, 10, count)


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(python2_pickle(*batch(seed)))
    return tmp_path


def test_files_of_python_2_are_read(folder):
    train, test = cifar10.load(folder)
    assert train.images.shape == (20, 32, 32, 3) and train.images.dtype == np.uint8
    assert test.images.shape == (4, 32, 32, 3)
    data, labels = batch(2)  # of data_batch_3: its images are 8 to 11
    np.testing.assert_array_equal(train.labels[8:12], labels)
    red, green = data[1, :1024].reshape(32, 32), data[1, 1024:2048].reshape(32, 32)
    np.testing.assert_array_equal(train.images[9, ..., 0], red)
    np.testing.assert_array_equal(train.images[9, ..., 1], green)


def test_missing_file_is_named(folder):
    (folder / "data_batch_4").unlink()
    with pytest.raises(cifar10.DataError, match=r"cannot read .*data_batch_4: No such file"):
        cifar10.load(folder)


def test_truncated_file_is_named(folder):
    file = folder / "test_batch"
    content = file.read_bytes()
    for size in {*range(40), *range(40, len(content), 997), len(content) - 1}:
        file.write_bytes(content[:size])
        with pytest.raises(cifar10.DataError, match=r"test_batch is no whole file .* again"):
            cifar10.read(file)


@pytest.mark.parametrize(
    "content",
    [
        b"an HTML page of an error",
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": 1}),
    ],
)
def test_other_file_is_named(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(cifar10.DataError, match=r"test_batch is no whole file"):
        cifar10.read(tmp_path / "test_batch")


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (np.zeros((2, 3071), np.uint8), [0, 1]),  # of another size
        (np.zeros((2, 3072), np.uint8), [0, 1, 2]),  # not as many
        (np.zeros((2, 3072), np.uint8), [0, 10]),  # CIFAR-100's
        (np.zeros((0, 3072), np.uint8), []),
    ],
)
def test_other_arrays_are_named(tmp_path, data, labels):
    (tmp_path / "test_batch").write_bytes(python2_pickle(data, labels))
    with pytest.raises(cifar10.DataError, match=r"test_batch has data uint8.*expected uint8\(N, 3"):
        cifar10.read(tmp_path / "test_batch")


class Code:
    """What would run on reading."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval, np.save])
@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_code_in_a_file_does_not_run(tmp_path, function, protocol):
    proof = tmp_path / "proof"
    args = {eval: (f"__import__('os').mkdir({str(proof)!r})",), np.save: (str(proof), 1)}
    code = Code(function, *args.get(function, (str(proof),)))
    bad = pickle.dumps({b"data": code, b"labels": [0]}, protocol)
    (tmp_path / "test_batch").write_bytes(bad)
    with pytest.raises(cifar10.DataError, match=r"test_batch .*asks for .*no image needs"):
        cifar10.read(tmp_path / "test_batch")
    assert os.listdir(tmp_path) == ["test_batch"]
    pickle.loads(bad)  # the test can fail: an ordinary reader runs it
    assert len(os.listdir(tmp_path)) == 2
