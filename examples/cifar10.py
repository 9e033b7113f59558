"""CIFAR-10 from a local copy of its Python files: 60,000 photographs of 32x32 pixels, ten classes.

The files are those of https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009). They are
pickles, and a pickle may call any function it names. This reader lets it name what an array needs
and nothing else.
"""

from collections.abc import Iterator
from pathlib import Path
import pickle
from typing import Any

from digits import CLASSES, Images
import numpy as np

TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = ("test_batch",)
SHAPE = (3, 32, 32)  # of an image, as it is stored

_reconstruct = np.empty(0).__reduce__()[0]  # how NumPy's arrays are pickled
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # the name before NumPy 2
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class DataError(Exception):
    """A file that cannot be used: which one, why, and the way out."""


class ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and arrays; refuses every other class or function."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}, which no image needs"
            ) from None


def read(path: Path) -> Images:
    """The images [N, 32, 32, 3], uint8, and labels of one file.

    Raises:
        DataError: the file is missing, truncated, damaged, or no file of CIFAR-10.
    """
    try:
        with path.open("rb") as file:
            content = ArrayUnpickler(file, encoding="bytes").load()
        images, labels = content[b"data"], np.asarray(content[b"labels"])
    except OSError as e:
        raise DataError(
            f"cannot read {path}: {e.strerror}; expected the folder cifar-10-batches-py with "
            f"{TRAIN[0]} to {TRAIN[-1]} and {TEST[0]}, unpacked from cifar-10-python.tar.gz"
        ) from e
    except Exception as e:  # a damaged pickle may raise anything
        raise DataError(
            f"{path} is no whole file of CIFAR-10 ({type(e).__name__}: {e}); unpack "
            "cifar-10-python.tar.gz again"
        ) from e
    pixels = int(np.prod(SHAPE))
    good = (
        isinstance(images, np.ndarray)
        and images.dtype == np.uint8
        and images.ndim == 2
        and images.shape[1] == pixels
        and labels.dtype.kind in "iu"
        and labels.shape == images.shape[:1]
        and len(labels) > 0
        and 0 <= labels.min() <= labels.max() < CLASSES
    )
    if not good:
        found = f"{getattr(images, 'dtype', type(images).__name__)}{np.shape(images)}"
        raise DataError(
            f"{path} has data {found} and labels {labels.dtype}{labels.shape}; expected "
            f"uint8(N, {pixels}) and N whole numbers below {CLASSES}: unpack "
            "cifar-10-python.tar.gz again"
        )
    return Images(images.reshape(-1, *SHAPE).transpose(0, 2, 3, 1), labels.astype(np.int32))


def load(folder: Path) -> tuple[Images, Images]:
    """The training set and the test set. Raises: DataError, see `read`."""

    def whole(names: tuple[str, ...]) -> Iterator[np.ndarray]:
        for parts in zip(*(read(folder / name) for name in names), strict=True):
            yield np.concatenate(parts)

    return Images(*whole(TRAIN)), Images(*whole(TEST))
