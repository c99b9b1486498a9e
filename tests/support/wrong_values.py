"""Descriptions in which something else stands than a program wrote."""

from collections.abc import Iterator, Sequence
from typing import Any


def changed(found: dict[str, Any], values: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The mapping with every value in turn, inner ones too, replaced by each of `values`, or left out."""
    for name, value in found.items():
        for other in values:
            yield {**found, name: other}
        yield {key: kept for key, kept in found.items() if key != name}
        if isinstance(value, dict):
            yield from ({**found, name: inner} for inner in changed(value, values))
