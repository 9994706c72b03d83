"""`memserve doctor`: look, and say in plain words what will and will not work. Exit status 1 if anything
is bad.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from memserve.doctor.report import Diagnosis, Finding, Verdict

if TYPE_CHECKING:
    from rich.console import Console

_MARKS = {
    Verdict.GOOD: "[green]good[/]",
    Verdict.ABSENT: "[dim]absent[/]",
    Verdict.WEAK: "[yellow]weak[/]",
    Verdict.BAD: "[red]bad[/]",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--no-kernels", is_flag=True, help="Leave the kernels out, which take longest.")
@click.option("--seed", default=0, show_default=True, help="Of the kernels' random inputs.", metavar="N")
def doctor(as_json: bool, no_kernels: bool, seed: int) -> None:
    """Look at this machine: memory, GPUs, kernels, a transfer; and say what will and will not work."""
    from rich.console import Console

    with Console(stderr=True).status("looking"):
        findings = tuple(examine(seed=seed, with_kernels=not no_kernels))
    diagnosis = Diagnosis(findings, tuple(summarise(findings)))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(diagnosis)).decode())
    else:
        show(diagnosis, Console() if sys.stdout.isatty() else Console(width=120))
    sys.exit(0 if diagnosis.is_sound else 1)


def examine(*, seed: int, with_kernels: bool) -> Iterator[Finding]:
    """Every finding, in the order in which it is shown."""
    from memserve.doctor.gpus import check_gpus
    from memserve.doctor.host import check_host
    from memserve.doctor.kernels import check_kernels
    from memserve.doctor.loopback import check_loopback
    from memserve.router.supervision.machine import read_machine

    machine = read_machine()
    on_host = list(check_host(machine))
    yield from on_host
    if any(each.name == "packages" and each.verdict is Verdict.BAD for each in on_host):
        return  # without torch there is nothing else to try
    found = list(check_gpus())
    yield from found
    has_driver = not any(each.name == "driver" for each in found)
    if has_driver and not machine.gpus:
        meaning = "Workers run on the CPU: install a torch built for CUDA to use the GPUs."
        yield Finding("GPUs", "torch", Verdict.WEAK, "the installed torch uses no GPU", meaning)
    yield from check_loopback()
    if with_kernels:
        yield from check_kernels("cuda:0" if machine.gpus else "cpu", seed)


def summarise(findings: Sequence[Finding]) -> Iterator[str]:
    """What will and will not work, in plain words."""

    def worst(section: str, part: str = "") -> Verdict | None:
        verdicts = [each.verdict for each in findings if each.section == section and part in each.name]
        return max(verdicts, key=list(Verdict).index, default=None)

    if worst("machine", "shared memory") is Verdict.BAD or worst("machine", "packages") is Verdict.BAD:
        yield "Nothing can be served on this machine as it is."
        return
    if worst("transfer") is Verdict.BAD:
        yield "On the CPU a colocated worker runs; prefill and decode workers cannot pass KV to each other."
    else:
        yield "On the CPU prefill and decode workers run, and pass KV through shared memory."
    if any(each.section == "GPUs" and each.name == "driver" for each in findings):
        yield "There is no GPU: everything runs on the CPU, and nothing about GPUs was checked."
    elif worst("GPUs", "torch") is not None:
        yield "There are GPUs, but the installed torch does not use them: everything runs on the CPU."
    elif (
        worst("GPUs", "memory between processes") is Verdict.BAD
        or worst("GPUs", "compute mode") is Verdict.BAD
    ):
        yield "On GPUs colocated workers run; prefill and decode workers there cannot pass KV to each other."
    else:
        yield "On GPUs prefill and decode workers run, two on one GPU too, and pass KV directly."
    kernels = worst("kernels")
    if kernels is Verdict.BAD:
        yield "Some kernels are not to be trusted here: see above."
    elif kernels is not None:
        interpreted = any(each.section == "kernels" and "interpreted" in each.found for each in findings)
        how = "under Triton's interpreter, which says nothing of a GPU" if interpreted else "on this GPU"
        yield f"All kernels compute what their plain twins do, {how}."


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print it."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    section = ""
    for finding in diagnosis.findings:
        if finding.section != section:
            section = finding.section
            table.add_row(f"[bold]{section}[/]")
        text = finding.found + (f"\n[dim]{finding.meaning}[/]" if finding.meaning else "")
        table.add_row(f"  {finding.name}", _MARKS[finding.verdict], text)
    console.print(table)
    console.print()
    for line in diagnosis.summary:
        console.print(line, soft_wrap=True)
