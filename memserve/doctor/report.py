"""What the doctor found: findings in sections, each with a verdict and what follows from it. No torch."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Verdict(StrEnum):
    """`GOOD` works; `ABSENT` is not there, and nothing is wrong with that; `WEAK` works worse than it could;
    `BAD` will not work.
    """

    GOOD = "good"
    ABSENT = "absent"
    WEAK = "weak"
    BAD = "bad"


class Finding(msgspec.Struct, frozen=True):
    """`found` in a few words, `meaning` a sentence for whoever has to decide what to do; empty = nothing to
    do.
    """

    section: str
    name: str
    verdict: Verdict
    found: str
    meaning: str = ""


class Diagnosis(msgspec.Struct, frozen=True):
    """All findings, in order, and in plain words what will work here and what will not."""

    findings: tuple[Finding, ...]
    summary: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is bad."""
        return all(finding.verdict is not Verdict.BAD for finding in self.findings)
