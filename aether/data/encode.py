"""Documents to token ids, in order, in this process or in a pool."""

import os
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from aether.data.prepared import TOKENIZER, dtype_for
from aether.data.tokenizers import Tokenizer, restore_tokenizer, split_text
from aether.errors import StorageError

TASK_BYTES = 1 << 20
Task = list[bytes]


def encode_all(
    texts: Iterable[bytes], tokenizer: Tokenizer, out: str, workers: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield (bytes of text, [eot, ids ...]) of each document, in order."""
    dtype = dtype_for(tokenizer.vocab_size)
    eot = np.array([tokenizer.eot], dtype)
    if not workers:
        for text in texts:
            yield len(text), [eot, tokenizer.encode(text).astype(dtype)]
        return
    sizes: deque[tuple[int, int]] = deque()  # (bytes, pieces) of the documents under way
    parts: list[np.ndarray] = []
    for result in _in_processes(_tasks(texts, tokenizer, sizes), os.path.join(out, TOKENIZER), workers):
        parts += result
        while sizes and len(parts) >= sizes[0][1]:
            n_bytes, count = sizes.popleft()
            yield n_bytes, [eot, *(p.astype(dtype, copy=False) for p in parts[:count])]
            parts = parts[count:]


def _tasks(texts: Iterable[bytes], tokenizer: Tokenizer, sizes: deque) -> Iterator[Task]:
    """Group the pieces of documents into tasks of about a megabyte."""
    task: Task = []
    filled = 0
    for text in texts:
        pieces = [text] if tokenizer.any_bytes else [p.encode() for p in split_text(text.decode())]
        sizes.append((len(text), len(pieces)))
        for piece in pieces:
            task.append(piece)
            filled += len(piece)
            if filled >= TASK_BYTES:
                yield task
                task, filled = [], 0
    if task:
        yield task


def _in_processes(tasks: Iterable[Task], tokenizer_folder: str, workers: int) -> Iterator[list[np.ndarray]]:
    """Encode tasks in a pool, in order, with a few under way for each process."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of whoever imported JAX
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer_folder,)) as pool:
        waiting: deque = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_encode_task, task))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as e:
            raise StorageError(
                "a process that tokenises died, perhaps for lack of memory; run again with fewer workers."
            ) from e
        finally:
            pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_folder: str) -> None:
    global _worker_tokenizer
    end_with_parent()
    _worker_tokenizer = restore_tokenizer(tokenizer_folder)


def end_with_parent() -> None:
    """End this process when its parent is killed, which pools of processes do not see to, and leave Ctrl-C to it."""
    import multiprocessing
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and the parent still wants batches

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _encode_task(task: Task) -> list[np.ndarray]:
    dtype = dtype_for(_worker_tokenizer.vocab_size)
    return [_worker_tokenizer.encode(piece).astype(dtype) for piece in task]
