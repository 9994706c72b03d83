"""What a turn of a conversation costs: its new tokens, or all of them.

    python benchmarks/conversation.py --plot conversation.png

The `small` shapes with dummy weights, bf16, a prefill and a decode worker of one thread each. A conversation
of `--turns` turns of `--new` tokens each, answered with `--out` tokens, is held with `--caching off` and with
`--caching full`, turn by turn in alternation between the two servers. Time to first token, ms, medians of
`--repeats` conversations; `cached` is what the answers report.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import aiohttp
import numpy as np
from rig import SHAPES, server, stream_completion

SHAPE = SHAPES["small"]
SETTINGS = ("off", "full")
OPTIONS = [
    "--prefill=1",
    "--decode=1",
    "--load-format=dummy",
    "--dtype=bfloat16",
    "--served-model-name=bench",
    "--threads=1",
]


async def converse(urls: dict[str, str], turns: int, new: int, out: int) -> dict[str, list[float]]:
    """One conversation on every server: seconds to the first token of each turn."""
    rng = np.random.default_rng()
    history: list[int] = []
    ttfts: dict[str, list[float]] = {setting: [] for setting in urls}
    async with aiohttp.ClientSession() as session:
        for _ in range(turns):
            prompt = history + rng.integers(3, SHAPE.vocab - 1, new).tolist()
            for setting, url in urls.items():
                answer = await stream_completion(session, url, prompt, out)
                ttfts[setting].append(answer.ttft_s)
            # the answers are not compared: what matters is that the next prompt continues this one
            history = prompt
    return ttfts


def plot(path: Path, lengths: list[int], rows: dict[str, list[float]]) -> None:
    """TTFT by the prompt's length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for setting, values in rows.items():
        axes.plot(lengths, values, marker="o", label=f"--caching {setting}")
    axes.set(xlabel="prompt, tokens", ylabel="time to first token, ms", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=16)
    parser.add_argument("--new", type=int, default=256, help="tokens that a turn adds [%(default)s]")
    parser.add_argument("--out", type=int, default=2, help="tokens of an answer [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    most = args.turns * args.new + args.out + 16
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "config.json").write_text(json.dumps(SHAPE.config() | {"max_position_embeddings": most}))
        urls = {}
        for setting in SETTINGS:
            given = [*OPTIONS, f"--max-model-len={most}", f"--caching={setting}"]
            urls[setting] = stack.enter_context(server(folder, *given, log=folder / setting))
        runs = [asyncio.run(converse(urls, args.turns, args.new, args.out)) for _ in range(args.repeats + 1)]
    rows = {
        setting: [1e3 * median(values) for values in zip(*(run[setting] for run in runs[1:]), strict=True)]
        for setting in SETTINGS
    }
    lengths = [(turn + 1) * args.new for turn in range(args.turns)]
    print(
        f"small, bf16, 1 thread a worker, {args.new} new tokens a turn; TTFT, ms, medians of {args.repeats}"
    )
    print(f"{'prompt':>8}" + "".join(f"{setting:>10}" for setting in SETTINGS))
    for at, length in enumerate(lengths):
        print(f"{length:>8}" + "".join(f"{rows[setting][at]:>10.1f}" for setting in SETTINGS))
    if args.json:
        args.json.write_text(json.dumps({"lengths": lengths, **rows}, indent=1))
    if args.plot:
        plot(args.plot, lengths, rows)


if __name__ == "__main__":
    main()
