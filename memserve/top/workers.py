"""The workers as a table, and their KV as bars: by role and tier, so that many workers take no more lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from rich.cells import cell_len
from rich.style import Style
from rich.table import Table
from rich.text import Text

from memserve.top.rates import WorkerRates
from memserve.top.snapshot import Worker
from memserve.top.text import NONE, amount, clean, size

# From so many columns on tables have all of theirs, and whole words.
WIDE = 120
HEADER = Style(reverse=True)
_STATES = {"ready": "green", "starting": "yellow", "down": "bold red"}
_ROLES = {"prefill": "P", "decode": "D", "colocated": "P+D"}
_BAR_COLUMNS = 16
_ACTIVE, _HISTORICAL, _FREE = ("█", "cyan"), ("▒", "blue"), ("·", "dim")


def table(width: int, first: str, longest: int, *columns: tuple[str, int], left: Sequence[str] = ()) -> Table:
    """One line a row. The first column is as wide as its `longest` cell, if there is room beside the others;
    numbers stand to the right.
    """
    made = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style=HEADER, pad_edge=False)
    rest = width - sum(columns + 1 for _, columns in columns) - 1
    for name, each in ((first, max(8, min(longest, rest - 1))), *columns):
        justify: Literal["left", "right"] = "left" if name == first or name in left else "right"
        made.add_column(name, width=each, no_wrap=True, overflow="ellipsis", justify=justify)
    made.add_column("", ratio=1, min_width=0)
    return made


def worker_table(workers: Sequence[Worker], rates: Mapping[str, WorkerRates], most: int, width: int) -> Table:
    """At most `most` rows; those that are not ready come first where not all have one."""
    wide = width >= WIDE
    shown, rest = list(workers), ""
    if len(shown) > most:
        shown.sort(key=lambda worker: worker.state == "ready")
        del shown[max(0, most - 1) :]
        rest = f"… and {len(workers) - len(shown)} more"
    longest = max((cell_len(clean(worker.id)) for worker in shown), default=0)
    made = table(
        width,
        "worker",
        max(longest, len(rest)),
        ("role", 9 if wide else 4),
        ("state", 8),
        ("life", 4),
        ("rst", 3),
        ("run", 4 if wide else 3),
        ("wait", 4),
        ("pull", 4),
        ("steps/s", 7),
        ("P tok/s", 7),
        ("D tok/s", 7),
        ("preem", 5),
        *([("KV", _BAR_COLUMNS)] if wide else []),
        left=("role", "state", "KV"),
    )
    for worker in shown:
        load, rate = worker.load, rates.get(worker.id)
        cells = [
            Text(clean(worker.id), "bold"),
            Text(clean(worker.role) if wide else _ROLES.get(worker.role, clean(worker.role))),
            Text(clean(worker.state), _STATES.get(worker.state, "")),
            Text(amount(worker.incarnation)),
            Text(amount(worker.restarts), "yellow" if worker.restarts else ""),
            *(Text(amount(number)) for number in (load.running, load.waiting, load.pulling)),
            *(Text(amount(number)) for number in (rate or (None, None, None))),
            Text(amount(load.preemptions), "yellow" if load.preemptions else ""),
        ]
        if wide:
            cells.append(bar(_of([worker]), _BAR_COLUMNS))
        made.add_row(*cells)
    if rest and most > 0:
        made.add_row(Text(rest, "dim"))
    return made


class Tier(NamedTuple):
    """Blocks of some workers' tier, and bytes a block (0 = not known). `active` None: none ever is there."""

    name: str
    active: int | None
    historical: int
    total: int
    block_bytes: int


def tiers(workers: Sequence[Worker]) -> list[Tier]:
    """By role, the device tier and, where there is one, the host tier."""
    found = []
    for role in dict.fromkeys(worker.role for worker in workers):
        those = [worker for worker in workers if worker.role == role]
        name = _ROLES.get(role, role)
        found.append(_of(those)._replace(name=f"{name} device"))
        if any(worker.max_host_blocks for worker in those):
            cached = sum(worker.load.historical_host_blocks for worker in those)
            room = sum(worker.load.num_host_blocks for worker in those)
            found.append(Tier(f"{name} host", None, cached, room, those[0].block_bytes))
    return found


def _of(workers: Sequence[Worker]) -> Tier:
    loads = [worker.load for worker in workers]
    return Tier(
        "device",
        sum(load.active_blocks for load in loads),
        sum(load.historical_blocks for load in loads),
        sum(load.num_blocks for load in loads),
        workers[0].block_bytes,
    )


def bar(tier: Tier, columns: int) -> Text:
    """Active, then historical, then free blocks."""
    if not tier.total:
        return Text(NONE, "dim")
    used = tier.active or 0
    active = min(columns, round(columns * used / tier.total))
    upto = min(columns, max(active, round(columns * (used + tier.historical) / tier.total)))
    made = Text()
    for (char, style), number in (
        (_ACTIVE, active),
        (_HISTORICAL, upto - active),
        (_FREE, columns - upto),
    ):
        made.append(char * number, style)
    return made


def tier_line(tier: Tier, columns: int) -> Text:
    """A bar of so many columns, and what it shows in words."""
    line = bar(tier, columns)
    if not tier.total:
        return line

    def told(number: int) -> str:
        return size(number * tier.block_bytes) if tier.block_bytes else amount(number)

    if tier.active is not None:
        line.append(f" {told(tier.active)} active,")
    line.append(f" {told(tier.historical)} cached of {told(tier.total)}")
    return line if tier.block_bytes else line.append(" blocks")
