"""Logging on stderr: lines for people, or one JSON object per line for machines."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

FIELDS = "fields"
"""Key of ``extra`` under which structured fields travel: ``log.info("…", extra={FIELDS: {…}})``."""


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, then the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """``time level logger: message key=value …``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, a traceback on lines of its own."""
        fields = getattr(record, FIELDS, {})
        if not fields:
            return super().format(record)
        tail = " ".join(f"{key}={_word(value)}" for key, value in fields.items())
        line, *rest = super().format(record).split("\n")
        return "\n".join([f"{line} [{tail}]", *rest])


def _word(value: object) -> str:
    """A value as one word: what a peer put into a path must not forge a field or a line."""
    text = str(value)
    return text if text.isprintable() and not set(text) & set(' "]') else json.dumps(text)


def configure(*, style: str, level: str) -> None:
    """Send every log record to stderr in one format, uvicorn's included.

    Args:
        style: ``text`` or ``json``.
        level: Least level logged.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
