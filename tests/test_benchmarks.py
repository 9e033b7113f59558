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

from benchmarks import __main__ as command_line, compare, peers, readme, record, report, torch_peers

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
        for when in ("26-2009", "22-1627")
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
        "| compiling a step: 1.2": lambda r: overhead(r, "compile"),
        "without `jit`: 1.2": lambda r: overhead(r, *calls),
    }
    table = (record.ROOT / "docs/results.md").read_text()
    for aim, reached in aims.items():
        assert f"{aim} | {reached(new):.2f} ({reached(old):.2f}) |" in table

    def passes(measure, name):
        return {
            round(r["bytes_moved"] / (4 * math.prod(r["shape"])))
            for r in new["times"]
            if (r["measure"], r["dtype"], r["implementation"]) == (measure, "float32", name)
        }

    assert (passes("step", "jax_bn"), passes("step", "flax.linen")) == ({10}, {15})
    assert "moves 10 passes over x in float32, 4 forward and 6 backward" in table
    assert passes("forward", "jax_bn") == {4} and passes("backward", "jax_bn") == {6}

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
    assert f"ours were {pair(old, 'step')}, {pair(old, 'network', fused)}" in said

    few = {
        r["shape"][-1]: r["over_flax"]["median"]
        for r in new["scaling"]["rows"]
        if r["implementation"] == "jax_bn" and r["shape"][-1] != 64
    }
    assert (
        "takes {:.1f} times Flax's at one feature, {:.1f} at two, {:.1f} at four, {:.1f} at eight, "
        "and less than Flax's from 16 on".format(*(few[n] for n in (1, 2, 4, 8)))
    ) in said
    assert max(ratio for features, ratio in few.items() if features >= 16) < 1
    of = {
        (r["what"], r["implementation"]): r["over_flax"]["median"] for r in new["overhead"]["rows"]
    }
    compiling = of["compile", "jax_bn"], of["compile", fused]
    assert (
        "takes {:.1f} times as long as with Flax's Linen layer, {:.1f} with".format(*compiling)
        in said
    )
    beside_nnx = of["eager forward", "jax_bn"] / of["eager forward", "flax.nnx"]
    assert f"takes {beside_nnx:.1f} times that of NNX's" in said


def of_the_h200(name):
    path = record.ROOT / "benchmarks" / "results" / f"2026-11-26-{name}.json"
    return json.loads(path.read_text())["times"]


def test_readme_says_of_the_h200_what_was_measured():
    text = (record.ROOT / "README.md").read_text()
    section = text.split("## On GPUs and TPUs")[1].split("\n## ")[0]
    said = re.sub(r"\s+", " ", section)
    for row in of_the_h200("1643-h200-resnet"):
        on_device, by_clock = (f"{1e3 * s:.1f} ms" for s in (
            row["device_seconds"], row["seconds"]["median"]
        ))  # fmt: skip
        ratio = f"{row['over_flax']['median']:.2f}".removesuffix(".00")
        assert f"| {on_device} | {by_clock} | {ratio} | {row['compile_seconds']:.0f} s" in said

    of: dict[str, dict] = {}
    clock: dict[str, dict] = {}
    for row in of_the_h200("1631-h200-steps"):
        case = tuple(row["shape"]), row["after"]
        of.setdefault(row["implementation"], {})[case] = row["device_seconds"]
        clock.setdefault(row["implementation"], {})[case] = row["seconds"]["median"]
    names = "jax_bn", "jax_bn kernels", "torch channels-last"
    flax, (xla, kernels, _) = of["flax.linen"], (of[name] for name in names)
    small = [(32, 7, 7, 2048), (256, 1024)]
    digits = 2, 2, 1

    def extremes(name, n):
        ratios = [of[name][case] / flax[case] for case in flax if case[0] not in small]
        return f"{min(ratios):.{n}f} to {max(ratios):.{n}f}"

    ranges = map(extremes, names, digits)
    assert "stages take {} of Flax's time, the kernels {}, PyTorch's eager kernels {},".format(
        *ranges
    ) in said  # fmt: skip
    for shape, last in zip(small, (2, 1), strict=True):
        case = shape, "nothing"
        ratios = [of[name][case] / flax[case] for name in names]
        told = f"{ratios[0]:.2f}, {ratios[1]:.2f} and {ratios[2]:.{last}f}"
        assert told in said
    beside = {case: kernels[case] / xla[case] for case in xla}
    large = [v for (shape, _), v in beside.items() if shape != (256, 1024)]
    assert f"take longer in {sum(v > 1 for v in beside.values())} of the 26 cases" in said
    assert f"else up to {max(large):.2f}; at best they take {min(large):.2f} of" in said
    few = [v for (shape, _), v in beside.items() if shape == (256, 1024)]
    assert f"at (256,1024) {few[0]:.1f} and {few[1]:.1f} times as long" in said
    for name, told in (("jax_bn kernels", "{} of the 26, by up to {:.2f}"),
                       ("jax_bn", "{}, by up to {:.2f}")):  # fmt: skip
        slower = [v for v in (clock[name][c] / clock["flax.linen"][c] for c in flax) if v > 1]
        assert f"in {told.format(len(slower), max(slower))}" in said

    quick = {
        (row["measure"], row["dtype"], row["implementation"]): f"{row['over_flax']['median']:.2f}"
        for row in of_the_h200("1651-h200-quick")
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
        for row in of_the_h200("1651-h200-quick")
        if (row["measure"], row["dtype"]) == ("network", "bfloat16") and row.get("bytes_moved")
    }
    told = f"move {moved['jax_bn fused']} MiB for {moved['jax_bn']} (Flax's {moved['flax.linen']})"
    assert told in said


def test_readme_and_results_say_of_the_chip_what_was_measured():
    """The table of the later run, the aims beside what came out, and the checks."""
    timed: dict[tuple, dict[str, dict]] = {}
    for row in of_the_h200("2128-h200-shapes"):
        case = tuple(row["shape"]), row["after"], row["measure"]
        timed.setdefault(case, {})[row["implementation"]] = row
    small, large = [(32, 7, 7, 2048), (256, 1024)], [(256, 56, 56, 64), (256, 14, 14, 1024)]
    large.append((256, 7, 7, 2048))
    ours, measures = ("jax_bn kernels", "jax_bn"), ("forward", "backward", "step")
    torch = "torch channels-last"

    def over_flax(name, shape, after, measure):
        return timed[shape, after, measure][name]["device_over_flax"]

    def span(values, form):
        return f"{form.format(min(values))} to {form.format(max(values))}"

    said = " ".join((record.ROOT / "README.md").read_text().split())
    for shape in small:
        for after in ("nothing", "residual, relu"):
            pairs = [[over_flax(name, shape, after, m) for name in ours] for m in measures]
            cells = " | ".join("{:.2f}, {:.2f}".format(*pair) for pair in pairs)
            assert f"| {cells} |" in said, (shape, after, cells)
    spans = [
        ", ".join(span([over_flax(n, s, "nothing", m) for s in large], "{:.2f}") for n in ours)
        for m in measures
    ]
    assert f"| {' | '.join(spans)} |" in said

    def slower(of, seconds):
        """In how many cases the kernels take longer than XLA's stages, of how many; by how much."""
        ratios = [
            seconds(c[ours[0]]) / seconds(c[ours[1]]) for case, c in timed.items() if of(case)
        ]
        return sum(v > 1 for v in ratios), len(ratios), max(ratios)

    def on_device(row):
        return row["device_seconds"]

    lost, steps, _ = slower(lambda case: case[2] == "step", on_device)
    assert f"they win {steps - lost} of the {steps} steps" in said
    passes_lost = slower(lambda case: case[2] != "step" and case[0] != (256, 1024), on_device)[0]
    assert (
        passes_lost == 0
        and slower(lambda c: c[::2] == ((256, 1024), "backward"), on_device)[0] == 0
    )
    lost, cases, most = slower(lambda case: True, lambda row: row["seconds"]["median"])
    assert f"in {lost} of the {cases} cases, by up to {most:.2f}" in said

    table = " ".join((record.ROOT / "docs/results.md").read_text().split())
    of_copy = {case: rows[ours[0]]["over_copy"] for case, rows in timed.items()}
    rates = [span([of_copy[s, "nothing", m] for s in large], "{:.0%}") for m in measures]
    assert f"step {rates[2]}, backward alone {rates[1]}, forward alone {rates[0]};" in table
    on_chip = [
        " and ".join(f"{of_copy[s, a, 'step']:.0%}" for a in ("nothing", "residual, relu"))
        for s in small
    ]
    assert "step {} at (32,7,7,2048), {} at (256,1024)".format(*on_chip) in table
    faster = [
        " and ".join(
            f"{1 / over_flax(ours[0], s, a, 'step'):.1f}" for a in ("nothing", "residual, relu")
        )
        for s in small
    ]
    assert "{} times at (32,7,7,2048), {} times at (256,1024)".format(*faster) in table
    beside_torch = [
        c[torch]["device_seconds"] / c[ours[0]]["device_seconds"]
        for case, c in timed.items()
        if case[2] == "step"
    ]
    assert f"| {span(beside_torch, '{:.1f}')} times, beside" in table

    step = timed[(256, 1024), "nothing", "step"]
    before = next(
        row["kernels"]
        for row in of_the_h200("1631-h200-steps")
        if (row["shape"], row["after"], row["implementation"]) == ([256, 1024], "nothing", ours[0])
    )
    assert (len(before), step[ours[0]]["launches"], step[ours[1]]["launches"]) == (10, 4, 5)
    times = sum(seconds for _, seconds in before), *(step[n]["device_seconds"] for n in ours)
    took = (
        "took {:.0f} us in ten launches, and takes {:.0f} in four; XLA's stages take {:.0f} in five"
    )
    assert took.format(*(1e6 * v for v in times)) in table
    own = [seconds for name, seconds in step[ours[0]]["kernels"] if "mosaic_gpu" in name]
    told = "two kernels, {:.0f} and {:.0f} us, where a copy of x takes {:.1f}"
    assert told.format(*(1e6 * v for v in (*own, step["copy"]["device_seconds"]))) in table

    path = record.ROOT / "benchmarks" / "results" / "2026-11-26-2127-h200-checks.json"
    checks = json.loads(path.read_text())["checks"]
    assert len({tuple(c["shape"]) for c in checks}) == 7
    for check in checks:
        assert (check["repetitions"], check["differing"]) == (1000, 0) and check["error"] <= 1
