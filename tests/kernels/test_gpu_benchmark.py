"""`python -m benchmarks.gpu` without a GPU: the whole way, interpreted; when it must not time."""

import json
import re
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu, gpu_checks, gpu_run
from benchmarks.device_time import PAUSE, Kernel, apart, of_a_call
from benchmarks.gpu_programs import AFTER, COPIES, COPY, IMPLEMENTATIONS, KERNELS, TORCH, inputs
from benchmarks.timing import Spread, Timing
from jax_bn import _implementation, _stages

pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU: run it")
FLAX_AND_OURS = {*IMPLEMENTATIONS} - {TORCH}


def is_json(path):
    """As other tools read it: without NaN and infinity."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.long
def test_dry_run(hopper, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_run, "MEASURES", ("forward",))  # each is interpreted, for seconds
    monkeypatch.setattr(gpu_run, "CLOCKS", "no such thing")
    out = tmp_path / "new" / "gpu.json"
    gpu.main(["--dry-run", "--only=checks,bfloat16", f"--out={out}"])
    result = is_json(out)
    assert result["ended"] == "complete" and result["settings"]["dry_run"]
    assert result["versions"]["jax"] and result["device"]["kind"] and result["commit"]
    assert all("not read" in read for read in result["clocks"].values())
    (check,) = result["checks"]
    assert 0 < check["error"] <= 1 and (check["repetitions"], check["differing"]) == (2, 0)

    names = {*IMPLEMENTATIONS} - {row["implementation"] for row in result["not_measured"]}
    assert names >= FLAX_AND_OURS
    rows = {row["implementation"]: row for row in result["times"]}
    assert rows.keys() == names | {*COPIES}
    for row in rows.values():
        assert (row["measure"], row["passes"]) == (
            "forward",
            2 if row["implementation"] in COPIES else 4,
        )
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["rounds"] == 2 and row["over_flax"]["median"] > 0
    printed = capsys.readouterr().out
    assert "| 8x256 | residual, relu | forward |" in printed and "mean nothing" in printed


@pytest.mark.long
def test_the_resnet(hopper, tmp_path, monkeypatch):
    """XLA's stages stand in for the kernels, which its layer has to ask for."""
    asked = []

    def stages(name, *args, **options):
        asked.append(name)
        return _stages.XLA

    monkeypatch.setattr(_implementation, "stages", stages)
    run = run_with(lambda x, *_: x, tmp_path / "gpu.json", monkeypatch)
    run.args.only = ["resnet"]
    run.all()
    assert set(asked) == {"xla", "mosaic_gpu"}
    rows = is_json(run.args.out)["times"]
    assert {(r["measure"], r["implementation"]) for r in rows} == {
        ("training step", name) for name in FLAX_AND_OURS
    }
    told = gpu.markdown(run.result)
    assert re.search(r"\| a ResNet \| training step \|( ~?\d+\.\d{3} ms[^|]*\|){3}", told)


def test_no_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main([f"--out={tmp_path / 'a.json'}"])
    told = capsys.readouterr().err
    assert "expected an NVIDIA GPU, an H100 or H200. --dry-run" in told or "want 0.11" in told
    assert not (tmp_path / "a.json").exists()


def test_rates():
    """Of 1 MB, 3 passes in 2 us are 1.5 times as fast as a copy's 2 in 2 us."""
    case = dict(shape=(1000, 500), dtype="bfloat16", after="relu", measure="forward")
    one = Spread(2e-6, 1e-6, 3e-6)
    timings = {COPY: Timing(one, None, 7, 1), KERNELS: Timing(one, one, 7, 1)}
    copy, ours = gpu_run.rows(timings, case, {}, {})
    assert (copy["passes"], ours["passes"], copy["over_copy"]) == (2, 3, 1)
    assert ours["terabytes_per_second"] == pytest.approx(1.5)
    assert ours["over_copy"] == pytest.approx(1.5)
    steps = gpu_run.rows(timings, case | dict(after="residual, relu", measure="step"), {}, {})
    assert [row["passes"] for row in steps] == [2, 4 + 8]
    # The device worked half of the time at ours, in two kernels, and all of it at the copy.
    on_device = {COPY: [Kernel("a", 0, 2e-6)], KERNELS: [Kernel("b", 0, 0.6e-6)] * 2}
    copy, ours = gpu_run.rows(timings, case, on_device, {KERNELS: 3.0})
    assert (ours["launches"], ours["device_seconds"]) == (2, pytest.approx(1.2e-6))
    assert (copy["over_copy"], ours["over_copy"]) == (1, pytest.approx(2.5))
    assert ours["compile_seconds"] == 3 and "compile_seconds" not in copy


def test_a_record_is_split_into_programs_and_calls():
    """Two programs, of two kernels and of one, each called three times."""
    first = [Kernel("ab"[i % 2], 1e-3 * i, 1e-4 * (1 + i)) for i in range(6)]
    second = [Kernel("c", 1 + 2 * PAUSE + 1e-3 * i, 1.0 if i == 1 else 5e-4) for i in range(3)]
    groups = apart([*first, *second])
    assert groups == [first, second]
    a, b = of_a_call(groups[0], 3)
    assert (a.name, b.name) == ("a", "b")
    assert (a.seconds, b.seconds) == (pytest.approx(3e-4), pytest.approx(4e-4))
    assert of_a_call(groups[1], 3)[0].seconds == pytest.approx(5e-4)
    with pytest.raises(ValueError, match="6 kernels are recorded; expected as many in 4"):
        of_a_call(first, 4)
    with pytest.raises(ValueError, match="2 calls ran different kernels"):
        of_a_call(first, 2)


def test_inputs_rotate():
    """Enough copies that together they are larger than a cache, at addresses of their own."""
    data = inputs((64, 8), "float32", AFTER["residual, relu"], rotated=10 * 64 * 8 * 4)
    arrays = [v for pair in data.pairs for v in jax.tree.leaves(pair)]
    assert len(arrays) == 4 * 3
    assert len({v.unsafe_buffer_pointer() for v in arrays}) == len(arrays)


# ---- checks --------------------------------------------------------------------------------------


def check(kernels, of_xla=lambda x, *_: x):
    """Of the identity, with these in place of the kernels, and of XLA's stages."""
    made = inputs((8, 16), "bfloat16", AFTER["nothing"], rotated=1)
    return gpu_checks.Check(lambda: made, 8, kernels, of_xla, lambda x, *_: x)


def some(v):
    return jax.tree.map(lambda a: a.at[0, 0].set(v), check(None).inputs().pairs[0][0])


def alternating():
    calls = []

    def kernels(x, *_):
        calls.append(x)
        changed = jax.tree.map(lambda a: a.at[3, 2].multiply(1.001953125 * 1.0078125), x)
        return changed if len(calls) % 2 == 0 else x

    return kernels


@pytest.mark.parametrize(
    "kernels, why",
    [
        (lambda x, *_: x, None),
        (lambda x, *_: jax.tree.map(lambda v: v * jnp.bfloat16(1.25), x), "the error is .* times"),
        (lambda x, *_: some(jnp.nan), "the error is 1e.09 times"),
        (alternating(), "3 of 6 repetitions have other bits"),
    ],
    ids=["right", "wrong", "nan", "not always the same"],
)
def test_checks(kernels, why):
    row = check(kernels).run(6)
    assert row["repetitions"] == 6
    found = gpu_checks.why_wrong(row)
    assert found is None if why is None else re.match(why, str(found))


@pytest.mark.parametrize("after", AFTER)
def test_no_cotangent_at_the_kink(after):
    """Where rounding says whether relu's derivative is 0 or 1, neither is an error."""
    made = inputs((64, 16), "float32", AFTER[after], rotated=1)
    ((xs, dy),) = made.pairs
    x, *residual = xs
    z = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)
    z = sum(residual, z * made.scale[None] + made.bias[None])
    tamed = gpu_checks._off_the_kink(lambda: near(made, z), AFTER[after]).pairs[0][1]
    if AFTER[after].relu:  # one z was put at 0
        assert tamed[5, 3] == 0 and dy[5, 3] != 0
        tamed = tamed.at[5, 3].set(dy[5, 3])
    assert jnp.array_equal(tamed, dy) and tamed.dtype == dy.dtype


def near(data, z):
    """With a residual, or else a bias, that brings one z to 0."""
    ((xs, dy),) = data.pairs
    x, *residual = xs
    if not residual:
        return data._replace(bias=data.bias.at[3].add(-z[5, 3]))
    return data._replace(pairs=[((x, residual[0].at[5, 3].add(-z[5, 3])), dy)])


def test_what_does_not_end_is_given_up():
    told = []
    with gpu_checks.limited(60, "this", told.append):
        pass
    with gpu_checks.limited(0.01, "that", told.append):
        time.sleep(0.5)
    assert told == ["that did not end within 0 s"]


def arguments(out):
    args = gpu.options().parse_args(["--dry-run", f"--out={out}", "--repetitions=1"])
    args.only = ["checks", "float32"]
    return args


def run_with(kernels, out, monkeypatch):
    monkeypatch.setattr(gpu_checks.Check, "compiled", lambda *case: check(kernels))
    return gpu_run.Run(arguments(out))


def test_nothing_is_timed_after_a_wrong_result(hopper, tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    run = run_with(lambda x, *_: some(9.0), out, monkeypatch)
    with pytest.raises(SystemExit, match=r"the error is .* Nothing is timed"):
        run.all()
    result = is_json(out)
    assert "8x256 float32, then residual, relu: the error is" in result["ended"]
    assert len(result["checks"]) == 1 and not result["times"]


def test_what_no_time_was_left_for_is_named(hopper, tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    run = run_with(lambda x, *_: x, out, monkeypatch)
    run.end = time.monotonic()
    run.all()
    lost = dict(shape=[8, 256], after="residual, relu", dtype="float32", reason="no time was left")
    assert is_json(out)["not_measured"] == [lost]
    assert "- no time was left (8x256 float32, then residual, relu)" in gpu.markdown(run.result)
