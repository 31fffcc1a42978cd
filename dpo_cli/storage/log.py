"""Messages of libraries go to train.log, not to the screen."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dpo_cli.storage.redaction import redact

Tell = Callable[[str], None]  # shows a message to the user


def hush() -> None:
    """Stop transformers, datasets and warnings from writing to the terminal; their records reach the root logger."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # datasets itself is imported when a trainer is
    if "datasets" in sys.modules:  # unless the caller of the Python API has imported it
        sys.modules["datasets"].disable_progress_bars()
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    # transformers 5.17 draws this one without its own switch.
    setattr(modeling_gguf_pytorch_utils, "tqdm", transformers.utils.logging.tqdm)  # noqa: B010
    transformers.utils.logging.disable_progress_bar()
    logging.captureWarnings(True)
    logging.getLogger().addHandler(logging.NullHandler())


def log_line(line: Mapping[str, object]) -> None:
    """A line of metrics.jsonl, for the log."""
    logging.getLogger("dpo").info("%s", line)


class _Patient(logging.FileHandler):
    """A full disk loses log records, but does not stop the training: important writes fail elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - a name of logging
        pass


class _Formatter(logging.Formatter):
    """Records, with their tracebacks, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Within, every log record, warning and failure is added to the file at `path`, if it is writable."""
    handler = _Patient(path, encoding="utf-8") if os.access(path.parent, os.W_OK) else logging.NullHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    before = root.level
    root.setLevel(logging.INFO)
    try:
        yield
    except Exception:
        root.exception("the run failed")  # the screen shows one line; the traceback is here
        raise
    finally:
        root.setLevel(before)
        root.removeHandler(handler)
        handler.close()
