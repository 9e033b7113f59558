"""What `train_digits.py` shows for its measurements: the table and the picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
import numpy as np

LIGHT, DARK = "#f5b041", "#1b2a49"


@dataclass
class Result:
    """The numbers of the table; a pair is (jax_bn, flax)."""

    test_images: int
    test_accuracy: tuple[float, float]
    final_loss: tuple[float, float]  # mean of the last epoch
    loss_difference_first_step: float
    loss_difference_largest: float
    loss_difference_largest_flax_to_flax: float
    steps: int
    time_ratio: float  # of one step, jax_bn to flax; median over the steps
    kept_bytes: tuple[int, int]
    temporary_bytes: tuple[int, int]


def table(r: Result) -> str:
    """The table as text: a column for each layer, and one that compares them."""

    def memory(label: str, sizes: tuple[int, int]) -> tuple[str, ...]:
        ours, flax = sizes
        return label, f"{ours / 2**20:.2f} MiB", f"{flax / 2**20:.2f} MiB", f"{ours / flax:.2f} x"

    accuracy, loss = r.test_accuracy, r.final_loss
    rows = [
        ("", "jax_bn", "flax", "jax_bn to flax"),
        (f"test accuracy, {r.test_images} images", *(f"{a:.1%}" for a in accuracy), ""),
        ("final loss, mean of the last epoch", *(f"{v:.5f}" for v in loss), ""),
        ("loss curves, difference at step 1", "", "", f"{r.loss_difference_first_step:.1e}"),
        ("loss curves, largest difference", "", "", f"{r.loss_difference_largest:.1e}"),
        ("  flax to flax, use_fast_variance=False", "", "",
         f"{r.loss_difference_largest_flax_to_flax:.1e}"),
        (f"time of a step, median of {r.steps} pairs", "", "", f"{r.time_ratio:.2f} x"),
        memory("kept by autodiff for the backward pass", r.kept_bytes),
        memory("temporaries of the compiled step", r.temporary_bytes),
    ]  # fmt: skip
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        "  ".join([label.ljust(first), *(c.rjust(w) for c, w in zip(cells, others, strict=True))])
        for label, *cells in rows
    ]
    return "\n".join(line.rstrip() for line in (lines[0], "-" * len(lines[0]), *lines[1:]))


def plot(losses: Mapping[str, Sequence[float]], result: Result, path: Path) -> None:
    """Draws the loss curves of jax_bn and Flax, and below how far they are apart at each step.

    Args:
        losses: of jax_bn, Flax, and Flax in another rounding: the yardstick.
        result: for the accuracies.
        path: of the PNG.
    """
    ours, flax, flax_other = (np.asarray(curve) for curve in losses.values())
    (our_name, flax_name, other_name), (our_accuracy, flax_accuracy) = losses, result.test_accuracy
    steps = np.arange(1, len(ours) + 1)
    dashes = (0, (4, 2))

    figure = Figure(figsize=(8, 6.5), dpi=150, layout="constrained")
    figure.suptitle("A residual network on handwritten digits: the same training, two layers")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))

    label = "{}: test accuracy {:.1%}".format
    above.plot(steps, flax, color=LIGHT, lw=6, label=label(flax_name, flax_accuracy))
    above.plot(steps, ours, color=DARK, lw=1.3, ls=dashes, label=label(our_name, our_accuracy))
    above.set(yscale="log", ylabel="training loss")
    above.legend(title="dashed is drawn on top of solid")

    below.plot(steps, abs(flax_other - flax), color=LIGHT, lw=2.5, label=f"flax and {other_name}")
    below.plot(steps, abs(ours - flax), color=DARK, lw=1.3, label=f"flax and {our_name}")
    below.set_yscale("symlog", linthresh=1e-8)  # logarithmic, but shows equal losses, at 0
    below.set(xlabel="training step", ylabel="|difference of the losses|", ylim=(0, None))
    below.legend(loc="lower right")

    for axes in (above, below):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
