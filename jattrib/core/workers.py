"""Processes of one thread, one a core, that run one program on many rows.

XLA's CPU client divides the operations of all programs of a process among the threads that all of them share, so that
programs of one thread disturb one another; in processes of their own they do not.  A worker is handed the program, in
JAX's portable form, and arrays, and knows nothing of the caller's code: `fn` may be a closure, in a script or a
notebook.
"""

import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import numpy as np
from jax import export
from jaxtyping import PyTree

from jattrib.core import mesh as meshes
from jattrib.core.errors import WorkerError

ONE_THREAD = {"xla_cpu_multi_thread_eigen": False}
"""The compiler's options for a program of one thread, on the CPU."""


class Workers:
    """Processes that compute `fn(operand, *row)`, for as long as a `with` block lasts; the first rows start them.

    They end with the block, and at once if this process dies.

    Args:
        fn: pure; what it closes over is compiled into the program.
        operand: a pytree of arrays, sent to every process once.
        like: the shapes and dtypes of a row's arrays.
        count: how many processes; as many as there are cores when left out.
    """

    def __init__(self, fn: Callable[..., PyTree], operand: PyTree, like: tuple[Any, ...], *, count: int | None = None):
        self._fn, self._operand, self._like = fn, operand, like
        self._count = count or meshes.cores()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(self._count)
        self._result: Any = None
        self._started = False

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def map(self, rows: Iterable[tuple[np.ndarray, ...]]) -> Iterator[PyTree]:
        """Yield what `fn` returns for each row, as NumPy arrays, in the order of the rows.

        Raises:
            WorkerError: a process has ended.
        """
        if not self._started:
            self._start()
        for leaves in self._threads.map(self._ask, rows):
            yield jax.tree.unflatten(self._result, leaves)

    def _start(self) -> None:
        command = [sys.executable, "-m", __name__]
        environment = {
            "TF_CPP_MIN_LOG_LEVEL": "3",  # or each says of programs in JAX's cache that they are for another machine
            **os.environ,
            "NPROC": "1",  # threads of XLA's pool
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": str(jax.config.read("jax_enable_x64")),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        pipe = subprocess.PIPE
        while len(self._processes) < self._count:
            # In groups of their own: an interrupt from the keyboard is for the parent alone.
            started = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, process_group=0)
            self._processes.append(started)
        leaves, structure = jax.tree.flatten(self._operand)
        operand = [np.asarray(leaf) for leaf in leaves]

        def run(operand: Any, row: Any) -> list[jax.Array]:
            found, self._result = jax.tree.flatten(self._fn(jax.tree.unflatten(structure, operand), *row))
            return found

        exported = export.export(jax.jit(run), platforms=["cpu"])(operand, self._like)
        message = bytes(exported.serialize()), operand
        self._started = True
        for process in self._processes:
            self._idle.put(process)
            _send(process, message)

    def _ask(self, row: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        process = self._idle.get()
        try:
            _send(process, row)
            return pickle.load(cast(Any, process.stdout))
        except (EOFError, pickle.UnpicklingError):
            raise _ended(process) from None
        finally:
            self._idle.put(process)


def _send(process: subprocess.Popen[bytes], message: Any) -> None:
    try:
        pickle.dump(message, cast(Any, process.stdin), protocol=pickle.HIGHEST_PROTOCOL)
        cast(Any, process.stdin).flush()
    except BrokenPipeError:
        raise _ended(process) from None


def _ended(process: subprocess.Popen[bytes]) -> WorkerError:
    return WorkerError(
        f"a worker process that ended with status {process.wait()}",
        expected="one that runs as long as there are rows",
        remedy="see its message above; -9 is most often a want of memory: train in this process, or on fewer cores",
    )


def _serve() -> None:
    """Answer rows, one by one, until the parent closes the pipe or dies."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints must not mix with the replies
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(inbox,), daemon=True).start()
    program, operand = inbox.get()
    run = jax.jit(export.deserialize(bytearray(program)).call, compiler_options=ONE_THREAD)
    operand = jax.device_put(operand)
    while True:
        found = [np.asarray(leaf) for leaf in run(operand, inbox.get())]
        pickle.dump(found, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()


def _read(inbox: "queue.SimpleQueue[Any]") -> None:
    while True:
        try:
            inbox.put(pickle.load(sys.stdin.buffer))
        except EOFError:
            os._exit(0)  # in the middle of a row, too: no one waits for it any more


if __name__ == "__main__":
    try:
        _serve()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # without waiting for the thread that reads
