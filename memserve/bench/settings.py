"""The paper's settings as servers of ours, and the contrasts between them (MemServe §Evaluation).

Each setting is a command line of `memserve serve` on the same cores with the same model and, by default, the
same number of workers: as many do both as there are of prefill and decode workers together. The server shares
the cores out evenly and pins the workers, so equal numbers have equal threads each. Fewer colocated workers
(`--colocated 1`) have more threads each, and one cache instead of several. Disaggregated, every prompt goes
to a prefill worker, as in the paper, however short it is (`least-load`); colocated with caching a prompt goes
where it is cached (the default policy), which is the best that can be done there.
"""

from __future__ import annotations

from typing import NamedTuple


class Setting(NamedTuple):
    """A name of the paper's and the options that make it."""

    name: str
    options: str


COLOCATED = Setting("PD-colocated", "--colocated {colocated} --caching off")
COLOCATED_CACHING = Setting("PD-colocated, caching", "--colocated {colocated} --caching full")
BASIC = Setting("PD-Basic", "--prefill {prefill} --decode {decode} --policy least-load --caching off")
CACHING_1 = Setting(
    "PD-Caching-1", "--prefill {prefill} --decode {decode} --policy least-load --caching prefill"
)
CACHING_2 = Setting(
    "PD-Caching-2", "--prefill {prefill} --decode {decode} --policy least-load --caching both"
)
CACHING_3 = Setting(
    "PD-Caching-3", "--prefill {prefill} --decode {decode} --policy least-load --caching full"
)

SETTINGS = (COLOCATED, COLOCATED_CACHING, BASIC, CACHING_1, CACHING_2, CACHING_3)
# Each against the other, in the paper's order: what disaggregation does, what caching adds to it, and what
# disaggregation is worth when both cache.
CONTRASTS = ((BASIC, COLOCATED), (CACHING_3, BASIC), (CACHING_3, COLOCATED_CACHING))


# Placements of the same requests on the same workers.
POLICIES = ("round-robin", "least-load", "session", "prompt-tree")


class Workers(NamedTuple):
    """How many of each role; None: as many colocated ones as there are of the other two."""

    prefill: int = 1
    decode: int = 1
    colocated: int | None = None


def policy_commands(workers: Workers, serve_options: str = "") -> dict[str, str]:
    """A command line a policy, of prefill and decode workers."""
    fleet = f"--prefill {workers.prefill} --decode {workers.decode}"
    return {name: f"memserve serve {fleet} --policy {name} {serve_options}".rstrip() for name in POLICIES}


def command(setting: Setting, workers: Workers, serve_options: str = "") -> str:
    """The server's command line. `serve_options` go to every setting alike."""
    both = workers.prefill + workers.decode if workers.colocated is None else workers.colocated
    own = setting.options.format(colocated=both, prefill=workers.prefill, decode=workers.decode)
    return f"memserve serve {own} {serve_options}".rstrip()
