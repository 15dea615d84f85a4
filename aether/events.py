"""TensorBoard's event files."""

import html
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Event files, written by the calling thread and opened by the first event.

    With a `start_step`, what earlier files in the folder say of later steps is forgotten.
    """

    def __init__(self, folder: Path, start_step: int | None = None) -> None:
        self._folder, self._start = folder, start_step
        self._writer: Any = None

    def _write(self, step: int, seconds: float, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if self._writer is None:
            from tensorboardX.event_file_writer import EventsWriter

            continued = self._folder.is_dir() and any(self._folder.iterdir())
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self._folder / "events"), f".{os.getpid()}.{secrets.token_hex(2)}")
            if (
                continued and self._start is not None
            ):  # TensorBoard then forgets what earlier files say of this step and later ones
                log = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(wall_time=seconds, step=self._start + 1, session_log=log))
        self._writer.write_event(Event(wall_time=seconds, step=step, **content))

    def scalars(self, step: int, seconds: float, split: str, values: Mapping[str, float | None]) -> None:
        """Write a line's numbers under `split/name`; `seconds` is when they were measured."""
        from tensorboardX.proto.summary_pb2 import Summary

        numbers = {k: float(v) for k, v in values.items() if v is not None and not isinstance(v, str)}
        content = [Summary.Value(tag=f"{split}/{k}", simple_value=v) for k, v in numbers.items()]
        self._write(step, seconds, summary=Summary(value=content))

    def text(self, step: int, seconds: float, tag: str, text: str) -> None:
        """Write a text, shown as it is."""
        from tensorboardX.summary import text as summary

        self._write(step, seconds, summary=summary(tag, f"<pre>{html.escape(text)}</pre>"))

    def flush(self) -> None:
        """Put everything on the disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
