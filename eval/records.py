"""Rows of csv, tsv and jsonl files with the number of the line they stand on, so that an error can name it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffeff.errors import DiffEffError

__all__ = ["PROMPT_COLUMNS", "Record", "RecordError", "integer", "optional_text", "read", "read_text", "text"]

PROMPT_COLUMNS = ("prompt", "caption", "text", "prompts", "captions")

Record = Mapping[str, Any]


class RecordError(DiffEffError, ValueError):
    """A file of prompts or of items that cannot be understood; names file, line and what was expected."""


def read(path: Path, *, cut_off: bool = False) -> Iterator[tuple[str, Record]]:
    """(where, row) of a .csv, .tsv or .jsonl file with the column names in lower case. Blank lines are skipped.

    `where` is the beginning of an error message about the row: `prompts.csv, line 3`.

    With `cut_off`, a last line of a .jsonl without its line end is left out if it is broken: a killed run leaves one.
    A line of a .jsonl may be a bare text, which becomes `{"prompt": text}`.
    Raises RecordError.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _jsonl(path, cut_off)
    return _csv(path, "\t" if suffix == ".tsv" else ",")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark. Raises RecordError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecordError(f"{path}, line {line}: not UTF-8. Save the file as UTF-8.") from error


def _jsonl(path: Path, cut_off: bool) -> Iterator[tuple[str, Record]]:
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if cut_off and number == len(lines):
                return
            raise RecordError(f"{path}, line {number}: not JSON ({error}).") from error
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, dict):
            raise RecordError(f"{path}, line {number}: expected an object or a text, found {type(row).__name__}.")
        yield f"{path}, line {number}", {str(key).strip().lower(): value for key, value in row.items()}


def _csv(path: Path, delimiter: str) -> Iterator[tuple[str, Record]]:
    rows = csv.reader(read_text(path).splitlines(keepends=True), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [cell.strip().lower() for cell in row]
                continue
            if len(row) != len(header):
                raise RecordError(
                    f"{path}, line {rows.line_num}: {len(row)} columns where the header has {len(header)}. "
                    'Put a text with the separator in it between double quotes: "like, this".'
                )
            yield f"{path}, line {rows.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise RecordError(f"{path}, line {rows.line_num}: not a table ({error}).") from error


def text(record: Record, columns: Sequence[str], where: str) -> str:
    """The text in the first of `columns` that the row has. Raises RecordError: no such column, empty, or no text."""
    column = next((name for name in columns if name in record), None)
    if column is None:
        raise RecordError(f"{where}: no column {_listed(columns)}. Found: {', '.join(record) or 'nothing'}.")
    found = optional_text(record, (column,), where)
    if found is None:
        raise RecordError(f"{where}: {column} is empty.")
    return found


def optional_text(record: Record, columns: Sequence[str], where: str) -> str | None:
    """The same, or None where there is nothing. Raises RecordError for what is no text."""
    column = next((name for name in columns if name in record), None)
    value = None if column is None else record[column]
    if value is not None and not isinstance(value, str):
        raise RecordError(f"{where}: {column} is {json.dumps(value)[:60]}, not a text.")
    return (value or "").strip() or None


def integer(record: Record, column: str, where: str) -> int | None:
    """The whole number in `column`; None when it is absent or empty. Raises RecordError."""
    value = record.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool | float):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise RecordError(f"{where}: {column} is {value!r}, not a whole number.") from None


def _listed(columns: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in columns[:3])
