"""Metrics as Prometheus reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """All samples of an exposition, by name and sorted labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    """One sample; 0 when it is not there yet, as a counter that never counted."""
    return samples(text).get((name, tuple(sorted(labels.items()))), 0.0)


def risen(before: str, after: str) -> Mapping[str, float]:
    """How much each counter with its labels has risen between two expositions; what did not is left out."""
    old = samples(before)
    risen = {key: now - old.get(key, 0.0) for key, now in samples(after).items()}
    return {
        name + "".join(f" {label}" for _, label in labels): by
        for (name, labels), by in risen.items()
        if by and re.search(r"_(total|count|sum)$", name)
    }
