"""The benchmarks from their command line: what they write, what they tell, what they refuse."""

import copy
from datetime import datetime
import json
import math
import os
import re
import statistics
import subprocess
import sys

import pytest

from benchmarks import (
    __main__ as command_line,
    compare,
    gpu_readme,
    peers,
    readme,
    record,
    report,
    torch_peers,
)
from jax_bn import _implementation, batch_norm

ROW = {"measure", "shape", "dtype", "implementation", "seconds", "over_flax", "bound_seconds"}
HERE = ["jax_bn", "jax_bn fused", "flax.linen"]
RESULTS = sorted((record.ROOT / "benchmarks" / "results").glob("*.json"))
OF_THE_DEMO = "demo.json"  # of an example, which knows no commit


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Of a tiny run, in which two peers are not there: the folder, the JSON file's path."""
    folder = tmp_path_factory.mktemp("results") / "not" / "there" / "yet"
    names = ",".join([*HERE, "haiku", torch_peers.CHANNELS_LAST])
    with pytest.MonkeyPatch.context() as patch:
        for module in ("haiku", "torch"):
            patch.setitem(sys.modules, module, None)  # then importing it is an ImportError
        peers.why_missing.cache_clear()
        torch_peers.why_missing.cache_clear()
        options = ["--quick", "--rounds=2", "--shape=6x2x2x4", "--dtypes=float32"]
        options += ["--only=step,network,counters,scaling", "--max-elements=2048"]
        command_line.main([*options, f"--implementations={names}", f"--out={folder}"])
    peers.why_missing.cache_clear()
    torch_peers.why_missing.cache_clear()
    (path,) = folder.glob("*.json")
    return folder, path


@pytest.fixture
def result(quick):
    return record.load(quick[1])


def test_fields(result):
    assert set(record.FIELDS) <= result.keys()
    assert result["versions"]["jax"] and result["device"]["kind"] and result["date"]
    assert result["bandwidth"]["bytes_per_second"] > 0
    timed = {(row["measure"], row["implementation"]) for row in result["times"]}
    assert timed == {("network", n) for n in HERE} | {("step", "jax_bn"), ("step", "flax.linen")}
    for row in result["times"]:
        assert row.keys() >= ROW and row["shape"] == [6, 2, 2, 4]
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["bytes_moved"] > 0 and row["peak_temporary_bytes"] >= 0
        passes = {"step": 8}.get(row["measure"])
        bound = passes and passes * 6 * 16 * 4 / result["bandwidth"]["bytes_per_second"]
        assert row["bound_seconds"] == pytest.approx(bound)
    assert {row["grows"] for row in result["scaling"]["rows"]} == {"N", "C"}
    assert {row["of"] for row in result["residuals"]} == {"one", "block"}


def test_collectives_are_counted_in_a_process_of_several_devices(result):
    counts = {(r["implementation"], r["measure"]): r["collectives"]["all-reduce"]
              for r in result["collectives"]["rows"]}  # fmt: skip
    assert counts["jax_bn", "forward"] == 2 and counts["jax_bn", "step"] == 3
    assert counts["flax.linen", "forward"] == 1


def test_report_and_pictures(quick, result):
    folder, path = quick
    text = path.with_suffix(".md").read_text()
    assert text == report.markdown(result) + "\n"
    for title in ("## Step", "## Network", "## Counted", "## Not measured"):
        assert title in text
    assert {p.name.rsplit("-", 1)[1] for p in folder.glob("*.png")} == {
        "bars.png",
        "roofline.png",
        "scaling.png",
    }


def test_a_missing_peer_is_named_with_the_reason(result):
    reasons = result["missing"]
    assert {r["implementation"] for r in result["not_measured"]} == {*reasons, "jax_bn fused"}
    text = report.markdown(result)
    for name, module in (("haiku", "haiku"), (torch_peers.CHANNELS_LAST, "torch")):
        assert module in reasons[name] and "ImportError" in reasons[name].replace(
            "ModuleNotFound", "Import"
        )
        assert f"| {name} | all | {reasons[name]} |" in text
        assert f"{name}: {reasons[name]}" in readme.section(result, record.ROOT / "a.json")


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    def wrong(x):
        return lambda x, scale, bias, state: (2 * x, state), ()

    monkeypatch.setitem(peers.PEERS, "wrong", peers.Peer(wrong))
    assert "ArithmeticError: y differs by" in str(peers.why_missing("wrong"))


def altered(result, factor, by="over_flax"):
    """The result, with ours slower by this factor in the network."""
    other = copy.deepcopy(result)
    for row in other["times"]:
        if (row["measure"], row["implementation"]) == ("network", "jax_bn"):
            row[by] = {k: v * factor for k, v in row[by].items()}
    return other


def steady(result):
    """The result with narrow quartiles: two rounds have none to speak of."""
    other = copy.deepcopy(result)
    for row in other["times"] + other["scaling"]["rows"]:
        for by in ("seconds", "over_flax"):
            median = row[by]["median"]
            row[by] = dict(median=median, low=0.95 * median, high=1.05 * median)
    return other


def test_compare_finds_a_change_and_ignores_noise(result):
    before = steady(result)
    found = list(compare.changes(before, altered(before, 1.5)))
    assert [(what, change) for what, _, _, change in found] == [
        ("network jax_bn 6x2x2x4 float32, time over flax.linen", "1.50 x, slower")
    ]
    assert "faster" in compare.table(altered(before, 1.5), before)
    assert "Nothing changed" in compare.table(before, altered(before, 1.04))
    # Seconds are the machine's: only where there is no ratio are they compared.
    slower = altered(before, 1.5, by="seconds")
    assert not list(compare.changes(before, slower))
    for row in before["times"]:
        row["over_flax"] = None
    assert [row[0] for row in compare.changes(before, slower)] == [
        "network jax_bn 6x2x2x4 float32, ms"
    ]


def test_compare_takes_others_for_the_measure_of_noise(result):
    before = steady(result)
    (ours,) = (r for r in before["times"] if (r["measure"], r["implementation"]) ==
               ("network", "jax_bn"))  # fmt: skip
    before["times"].append(ours | dict(implementation="haiku"))
    after = altered(before, 1.5)
    assert len(list(compare.changes(before, after))) == 1
    other = after["times"][-1]
    other["over_flax"] = {k: v * 1.6 for k, v in other["over_flax"].items()}
    assert [row[-1] for row in compare.changes(before, after)] == []
    after["versions"]["dm-haiku"] = "0.0"  # then it may have changed itself
    assert len(list(compare.changes(before, after))) == 2


def test_compare_tells_counts_circumstances_and_what_only_one_has(result):
    after = copy.deepcopy(result)
    after["commit"] = "other"
    after["versions"]["jax"] = "0.0"
    after["residuals"][0]["residual_bytes"] *= 2
    after["times"] = [r for r in after["times"] if r["measure"] != "step"]
    text = compare.table(result, after)
    for told in ("-> other", "-> 0.0", "2.00 x", "Only before: step flax.linen 6x2x2x4 float32"):
        assert told in text


def test_readme_is_rewritten_between_its_markers(quick, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    command_line.main(["readme", str(quick[1]), "--write", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "wins" in text and "losses" in text
    command_line.main(["readme", str(quick[1]), "--write", str(page)])
    assert page.read_text() == text
    command_line.main(["readme", str(quick[1])])
    assert capsys.readouterr().out.strip() in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["compare", "{whole}", "{folder}/none.json"], "cannot read .*none.json'"),
        (["compare", "{whole}", "{folder}/cut.json"], "cut.json' is no JSON, or was cut off"),
        (["readme", "{folder}/cut.json"], "cut.json' is no JSON, or was cut off"),
        (["readme", "{folder}/list.json"], "list.json' is no result .* no 'date'"),
        (["readme", "{whole}", "--write", "{folder}/bare.md"], "bare.md': expected one '<!-- "),
        (["--only=steps"], "--only: 'steps'; expected some of: forward, backward"),
        (["--implementations=keras"], "'keras'; expected some of: jax_bn"),
        (["--shape=32"], "'32'; expected sizes like"),
        (["--shape=32x-1"], "'32x-1'; expected sizes like"),
        (["--rounds=0"], "'0'; expected a whole number > 0"),
        (["--out={folder}/cut.json/sub"], "cannot write into"),
    ],
)
def test_errors(options, message, quick, tmp_path, capsys):
    whole = quick[1]
    (tmp_path / "cut.json").write_text(whole.read_text()[:1000])
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bare.md").write_text("no markers")
    with pytest.raises(SystemExit) as stopped:
        command_line.main([o.format(whole=whole, folder=tmp_path) for o in options])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_run_starts_anew_with_its_settings_once(monkeypatch):
    calls = []
    for name in command_line.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(command_line.sys, "platform", "linux")
    monkeypatch.setattr(os, "execve", lambda *args: calls.append(args))
    monkeypatch.setattr(command_line, "main", lambda argv: None)
    command_line.start(["--quick"])
    ((_, _, environment),) = calls
    assert environment["MALLOC_ARENA_MAX"] == "1" and environment["OMP_WAIT_POLICY"] == "ACTIVE"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command_line.start(["--quick"])
    command_line.start(["compare", "a", "b"])
    assert len(calls) == 1


def test_results_are_json_of_other_tools_too(quick):
    """No NaN and no infinity, which JSON does not have."""

    def refuse(name):
        raise AssertionError(name)

    json.loads(quick[1].read_text(), parse_constant=refuse)


# ---- the committed results -----------------------------------------------------------------------


def git(*args):
    """Its output, or the reason why there is none."""
    try:
        command = ["git", "-C", str(record.ROOT), *args]
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        return None, str(e)
    return (None if done.returncode else done.stdout.strip()), done.stderr.strip()


def committed(path):
    """The result; skips where git knows that it is only here. Without git all that came is."""
    if git("ls-files", str(path))[0] == "":
        pytest.skip(f"{path.name} is not committed")
    return json.loads(path.read_text())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_committed_result_says_where_it_was_made(path):
    result = committed(path)
    assert datetime.fromisoformat(result["date"])
    if path.name == OF_THE_DEMO:
        assert all(result[name] for name in ("device", "python", "jax", "flax", "jax_bn"))
        return
    assert all(result["device"][name] for name in ("platform", "kind"))
    assert all(result["versions"][name] for name in ("python", "jax", "jaxlib", "jax_bn"))
    assert re.fullmatch("[0-9a-f]{7,40}", result["commit"])  # and no +changes


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_the_commit_of_a_result_is_in_the_history(path):
    result = committed(path)
    if path.name == OF_THE_DEMO:
        pytest.skip("the demo's names no commit")
    shallow, why_not = git("rev-parse", "--is-shallow-repository")
    if shallow != "false":
        pytest.skip(why_not or "a shallow clone")
    found, why_not = git("merge-base", "--is-ancestor", result["commit"], "HEAD")
    assert found is not None, f"{result['commit']} is not behind HEAD. {why_not}"


def test_readme_and_results_say_of_the_cpu_what_was_measured():
    """The table of aims beside what came out, of two result files, and the README's sentences."""
    new, old = (
        record.load(record.ROOT / f"benchmarks/results/2026-11-{when}-cpu.json")
        for when in ("27-1348", "27-0943")
    )

    def ratios(result, measure, dtype, implementation="jax_bn"):
        return [
            r["over_flax"]["median"]
            for r in result["times"]
            if (r["measure"], r["dtype"], r["implementation"]) == (measure, dtype, implementation)
        ]

    def mean(*of):
        return statistics.geometric_mean(ratios(*of))

    def beside_torch(result, dtype):
        return mean(result, "step", dtype) / mean(result, "step", dtype, "torch channels-last")

    def overhead(result, *which):
        return max(
            r["over_flax"]["median"]
            for r in result["overhead"]["rows"]
            if r["implementation"] == "jax_bn" and r["what"] in which
        )

    calls = "trace", "eager forward", "eager step", "jitted forward", "jitted step"
    aims = {
        "| step, float32: 0.75": lambda r: mean(r, "step", "float32"),
        "| step, bfloat16: 0.42": lambda r: mean(r, "step", "bfloat16"),
        "| step, every shape: 1.0": lambda r: max(
            ratios(r, "step", "float32") + ratios(r, "step", "bfloat16")
        ),
        "layer, float32: 0.8": lambda r: mean(r, "network", "float32", "jax_bn fused"),
        "| the same, bfloat16: 0.7": lambda r: mean(r, "network", "bfloat16", "jax_bn fused"),
        "channels-last, float32: 1.2": lambda r: beside_torch(r, "float32"),
        "| the same, bfloat16: 1.0": lambda r: beside_torch(r, "bfloat16"),
        "| compiling a step at 64x32: 1.2": lambda r: overhead(r, "compile"),
        "without `jit`: 1.2": lambda r: overhead(r, *calls),
    }
    table = (record.ROOT / "docs/results.md").read_text()
    for aim, reached in aims.items():
        assert f"{aim} | {reached(new):.2f} ({reached(old):.2f}) |" in table

    shape = "32x28x28x128"
    large = f"compile {shape}"
    assert f"| the same at 32x28x28x128: 1.2 | {overhead(new, large):.2f} |" in table
    of = {
        (r["what"], r["implementation"]): r["over_flax"]["median"] for r in new["overhead"]["rows"]
    }
    blocks = [of[what, "jax_bn fused"] for what in ("compile block", f"compile block {shape}")]
    assert "around Flax's: 1.2 | {:.2f} and {:.2f} |".format(*blocks) in table

    width = {"float32": 4, "bfloat16": 2}

    def passes(measure, name, dtype="float32"):
        of = [
            r["bytes_moved"] / (width[dtype] * math.prod(r["shape"]))
            for r in new["times"]
            if (r["measure"], r["dtype"], r["implementation"]) == (measure, dtype, name)
        ]
        assert max(of) - min(of) < 0.2  # of what has but one entry a feature
        return round(min(of), 1)

    assert (passes("step", "jax_bn"), passes("step", "flax.linen")) == (9, 15)
    assert (passes("forward", "jax_bn"), passes("backward", "jax_bn")) == (3.5, 5.5)
    assert "moves 9 passes over x in float32, 3.5 forward and 5.5 backward, and\nFlax's 15" in table
    narrow = [passes("step", name, "bfloat16") for name in ("jax_bn", "flax.linen")]
    assert narrow == [11.5, 29] and "in bfloat16 11.5 and 29" in table
    assert passes("forward", "flax.linen") == 4 and "Flax's forward pass moves 4" in table

    def pair(result, measure, name="jax_bn"):
        float32, bfloat16 = (mean(result, measure, d, name) for d in ("float32", "bfloat16"))
        return f"{float32:.2f} and {bfloat16:.2f}"

    torch, fused = "torch channels-last", "jax_bn fused"
    said = " ".join((record.ROOT / "README.md").read_text().split())
    assert f"the step takes {pair(new, 'step')} of Flax's time" in said
    assert f"(PyTorch channels-last {pair(new, 'step', torch)})" in said
    assert (
        f"in the layer {pair(new, 'network', fused)} (PyTorch {pair(new, 'network', torch)})"
        in said
    )
    assert f"the forward pass alone {pair(new, 'forward')}" in said
    assert f"with every fifth example masked {pair(new, 'masked')}" in said
    assert f"small ResNet with the layer that has them {pair(new, 'resnet', fused)}" in said
    older = ", ".join((pair(old, "step"), *(pair(old, n, fused) for n in ("network", "resnet"))))
    assert f"steps, network and ResNet were {older}" in said

    few = {
        r["shape"][-1]: r["over_flax"]["median"]
        for r in new["scaling"]["rows"]
        if r["implementation"] == "jax_bn" and r["shape"][-1] != 64
    }
    assert (
        "takes {:.2f} of Flax's time at one feature, {:.2f} at two, {:.2f} at four, {:.2f} at "
        "eight, and at most {:.2f} from 16 on".format(
            *(few[n] for n in (1, 2, 4, 8)), max(v for n, v in few.items() if n >= 16)
        )
    ) in said
    compiling = of["compile", "jax_bn"], of[large, "jax_bn"]
    small, other = (f"{v:.2f}" for v in compiling)
    assert f"takes {small} of the time with Flax's Linen layer, at {shape} {other}" in said
    assert "in our layer and around Flax's, {:.2f} and {:.2f}".format(*blocks) in said
    beside_nnx = of["eager forward", "jax_bn"] / of["eager forward", "flax.nnx"]
    assert f"takes {beside_nnx:.1f} times that of NNX's" in said


def of_the_h200(name):
    path = record.ROOT / "benchmarks" / "results" / f"2026-11-26-{name}.json"
    return json.loads(path.read_text())


def test_readme_says_of_the_h200_what_was_measured():
    text = (record.ROOT / "README.md").read_text()
    section = text.split("## On GPUs and TPUs")[1].split("\n## ")[0]
    said = re.sub(r"\s+", " ", section)
    quick = {
        (row["measure"], row["dtype"], row["implementation"]): f"{row['over_flax']['median']:.2f}"
        for row in of_the_h200("1651-h200-quick")["times"]
    }
    step = [quick["step", dtype, "jax_bn"] for dtype in ("bfloat16", "float32")]
    assert "takes {} of Flax's time in bfloat16 and {} in float32".format(*step) in said
    forward = [quick["forward", dtype, "jax_bn"] for dtype in ("float32", "bfloat16")]
    assert "takes {} of Flax's time in float32 and {} in bfloat16".format(*forward) in said
    network = [quick["network", "bfloat16", name] for name in ("jax_bn fused", "jax_bn")]
    assert (
        "take {} in bfloat16 with relu and residual in the layer, {} with".format(*network) in said
    )
    moved = {
        row["implementation"]: f"{row['bytes_moved'] / 2**20:.0f}"
        for row in of_the_h200("1651-h200-quick")["times"]
        if (row["measure"], row["dtype"]) == ("network", "bfloat16") and row.get("bytes_moved")
    }
    told = f"move {moved['jax_bn fused']} MiB for {moved['jax_bn']} (Flax's {moved['flax.linen']})"
    assert told in said


def test_tables_of_the_h200_are_those_of_the_results():
    for name, text in gpu_readme.sections(gpu_readme.measured()).items():
        assert text in (record.ROOT / name).read_text(), "python -m benchmarks.gpu_readme"


def test_none_takes_the_kernels_where_they_were_measured_to_be_faster():
    kinds = {of_the_h200("2354-h200")["device"]["kind"]}
    faster = gpu_readme.faster(gpu_readme.measured())
    assert {(kind, *x) for kind in kinds for x in faster} == _implementation.FASTER
    (told,) = {f"{examples} examples of {features} features" for _, examples, features in faster}
    for text in ((record.ROOT / "README.md").read_text(), batch_norm.__doc__ or ""):
        assert told in " ".join(text.split())


def test_readme_and_results_say_beside_the_tables_of_the_h200_what_was_measured():
    readme_says, results_say = (
        " ".join((record.ROOT / name).read_text().split())
        for name in ("README.md", "docs/results.md")
    )
    rows = gpu_readme.measured()
    time = gpu_readme.on_device
    ours, kernels, flax = "jax_bn", "jax_bn kernels", "flax.linen"
    cases = gpu_readme.layers(rows)
    narrow = {key[1:]: case for key, case in cases.items() if key[0] == "float32"}
    steps = [time(c[kernels]) / time(c[ours]) for k, c in narrow.items() if k[2] == "step"]
    assert f"they lose to XLA's stages: a step by up to {max(steps):.2f}" in readme_says
    forwards = [
        gpu_readme.by_clock(case[kernels]) / gpu_readme.by_clock(case[ours])
        for key, case in cases.items()
        if (key[0], key[3]) == ("bfloat16", "forward")
    ]
    assert sum(v > 1 for v in forwards) == len(forwards) // 2
    assert f"half of the forward passes, small ones by up to {max(forwards):.2f}" in readme_says
    lost = [
        max(time(c[n]) / time(c[flax]) for (_, _, m), c in narrow.items() if m == "backward")
        for n in (ours, kernels)
    ]
    assert "lost to Flax's there with a residual and relu" in readme_says
    assert "by up to {:.2f} through XLA and {:.2f} with the kernels".format(*lost) in readme_says

    of_copy = [
        (key[3], case[kernels]["over_copy"])
        for key, case in cases.items()
        if key[0] == "bfloat16" and 2 * math.prod(key[2]) >= 1e8
    ]
    below = [(measure, f"{v:.0%}") for measure, v in of_copy if v < 0.9]
    assert sorted(below) == [("forward", "87%"), ("forward", "88%"), ("forward", "88%")]
    assert "but for three forward passes alone of 87% and 88%" in results_say
    chip = {k[1:]: c for k, c in cases.items() if k[0] == "bfloat16" and k[2] in gpu_readme.FEW}
    above = [key for key, case in chip.items() if case[kernels]["over_copy"] > 1]
    assert above == [("residual, relu", (256, 1024), "backward")]
    network = {r["implementation"]: r for r in rows if r["measure"] == "training step"}
    faster = [f(network[flax]) / f(network[kernels]) for f in (time, gpu_readme.by_clock)]
    assert "| {:.2f} times on the device, {:.2f} by the clock |".format(*faster) in results_say

    small = cases["bfloat16", "nothing", (256, 1024), "step"]
    own = [1e6 * seconds for name, seconds in small[kernels]["kernels"] if "mosaic_gpu" in name]
    copied = 1e6 * time(small["copy"])
    told = f"take {own[0]:.1f} and {own[1]:.1f} us, where a copy of x takes {copied:.1f}"
    assert told in results_say

    by_cudnn = {
        (dtype, len(shape))
        for (dtype, _, shape, _), case in cases.items()
        if any("cudnn" in name for name, _ in case["torch channels-last"]["kernels"])
    }
    assert by_cudnn == {("float32", 4)}
    beside = [time(c["torch channels-last"]) / time(c[kernels]) for k, c in narrow.items()
              if k[2] == "step" and k[1] not in gpu_readme.FEW]  # fmt: skip
    assert f"cuDNN's, {min(beside):.2f} to {max(beside):.2f} times" in results_say
    checks = of_the_h200("2354-h200")["checks"]
    assert len(checks) == 42 and len({tuple(c["shape"]) for c in checks}) == 7
    for check in checks:
        assert (check["repetitions"], check["differing"]) == (1000, 0) and check["error"] <= 1
