"""A job holds settings groups and built parts, not a copy of every setting."""

from __future__ import annotations

from dataclasses import fields

from opdkit.train.job import Job


def test_a_job_has_few_fields() -> None:
    assert len(fields(Job)) <= 16
