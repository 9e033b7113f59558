"""Several processes on this machine's CPU, as if each were a host of a cluster."""

from collections.abc import Sequence
import os
from queue import SimpleQueue
import signal
import socket
import subprocess
import sys
from threading import Thread


def launch(script: str, options: Sequence[str], processes: int) -> None:
    """Runs the script so many times at once, and returns when all have ended well.

    The script gets the options and, each time another, those that `jax.distributed.initialize`
    needs: --coordinator, --num-processes, --process-id. When one process fails, the others are
    ended, and this one exits with its code, having said which one it was.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    # gRPC would send even what stays on this machine through a proxy.
    env = {name: v for name, v in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_BIND_ADDRESS": coordinator}
    command = [sys.executable, script, *options, f"--coordinator={coordinator}"]
    command.append(f"--num-processes={processes}")
    children: list[subprocess.Popen] = []
    ended: SimpleQueue[tuple[int, int]] = SimpleQueue()  # in order: the first to fail is the cause

    def watch(i: int) -> None:
        ended.put((i, children[i].wait()))

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of `finally`
    try:
        for i in range(processes):
            children.append(subprocess.Popen([*command, f"--process-id={i}"], env=env))
            Thread(target=watch, args=(i,), daemon=True).start()
        ends = (ended.get() for _ in children)
        failed = next(((i, code) for i, code in ends if code), None)
    finally:
        for child in children:
            child.kill()  # not terminate(): JAX takes SIGTERM for a notice, and goes on
            child.wait()
    if failed:
        i, code = failed
        how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        print(f"\nprocess {i} ended with {how}; the others were stopped", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)  # as a shell reports a signal
