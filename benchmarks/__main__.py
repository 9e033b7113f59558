"""`python -m benchmarks` measures; `... compare A.json B.json` and `... readme A.json` tell.

On a CPU the C library gives large arrays back to the system and gets them anew, page by page, at
each call, and that is what a naive timing measures. So a run starts itself again with an allocator
that keeps what it has: these settings have to be there before the process is. `run.keep_pages`
then gives it pages to keep. The result has these settings; those set before stay as they are.
"""

import argparse
from collections.abc import Sequence
import os
from pathlib import Path
import sys

SETTINGS = {  # the allocator's are those of glibc; other C libraries ignore them
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
    # PyTorch's threads sleep while they wait. Spinning, they slow whatever runs after them, and on
    # a machine with other work they slow themselves 25 times.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def chosen(text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}; expected some of: {', '.join(known)}")
    return names


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) < 2 or not all(s.isdecimal() and int(s) > 0 for s in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}; expected sizes like 32x14x14x256 or 256x1024")
    return tuple(map(int, sizes))


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number > 0")
    return int(text)


def _folder(text: str) -> Path:
    path = Path(text)
    try:  # now, not after the measurements
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as e:
        raise argparse.ArgumentTypeError(f"cannot write into {text!r}: {e.strerror}") from e
    return path


def options() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands."""
    from benchmarks.run import DTYPES, NAMES, SECTIONS

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    made = {}

    def command(name: str, help: str) -> argparse.ArgumentParser:
        defaults = argparse.ArgumentDefaultsHelpFormatter
        made[name] = commands.add_parser(name, help=help, formatter_class=defaults)
        return made[name]

    def some(known: Sequence[str], unless: str) -> dict:
        return dict(type=lambda text: chosen(text, known), default=unless, metavar="A,B")

    run = command("run", "measure: the default")
    run.add_argument("--quick", action="store_true", help="a few shapes, in less than two minutes")
    run.add_argument("--only", **some(SECTIONS, ",".join(SECTIONS)), help="parts of the run")
    run.add_argument("--implementations", **some(NAMES, ",".join(NAMES)), help="which to compare")
    run.add_argument("--dtypes", **some(DTYPES, ",".join(DTYPES)), help="of x")
    run.add_argument("--shape", type=_shape, action="append", help="of x, instead of the usual")
    run.add_argument("--rounds", type=positive, help="instead of as many as the time allows")
    run.add_argument("--max-elements", type=positive, default=2**27, help="of x, in scaling")
    results = Path(__file__).parent / "results"
    run.add_argument("--out", type=_folder, default=results, help="folder of the results")
    compare = command("compare", "what changed between two results, beyond the noise")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    readme = command("readme", "the section of the README on performance, from a result")
    readme.add_argument("result", type=Path)
    readme.add_argument("--write", type=Path, help="rewrite it in this file, between its markers")
    return parser, made


def main(argv: Sequence[str]) -> None:
    """The command line, without the fresh start."""
    from benchmarks import compare, plots, readme, record, report, run

    first = argv[0] if argv else ""
    parser, commands = options()
    known = first in commands or first in ("-h", "--help")
    args = parser.parse_args(argv if known else ["run", *argv])
    try:
        if args.command == "compare":
            print(compare.table(record.load(args.before), record.load(args.after)))
        elif args.command == "readme":
            text = readme.section(record.load(args.result), args.result)
            if args.write:
                readme.rewrite(args.write, text)
            else:
                print(text)
        else:
            result = run.run(args)
            stem = report.write(result, args.out)
            drawn = plots.draw(result, stem)
            print(report.markdown(result))
            for path in (stem.with_suffix(".json"), stem.with_suffix(".md"), *drawn):
                print(f"wrote {path}", file=sys.stderr)
    except record.BadResult as e:
        commands[args.command].error(str(e))


def start(argv: Sequence[str]) -> None:
    """`main`; in a process with the settings if something is to be measured."""
    measures = not {"-h", "--help", "compare", "readme"} & set(argv)
    if measures and sys.platform == "linux" and not SETTINGS.keys() <= os.environ.keys():
        chosen = ", ".join(f"{name}={os.environ.get(name, v)}" for name, v in SETTINGS.items())
        print(f"starting anew with {chosen}", file=sys.stderr)
        os.execve(sys.executable, sys.orig_argv, SETTINGS | os.environ)
    main(argv)


if __name__ == "__main__":
    start(sys.argv[1:])
