"""The two loops of `memserve top`: one asks the server, one draws, so that a slow answer freezes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live

from memserve.top.client import TopClient
from memserve.top.keys import listening
from memserve.top.view import State, render

# Drawn at least so often: ages go on, and a terminal may change its size.
_DRAW_S = 0.5
Clock = Callable[[], float]


async def watch(client: TopClient, interval_s: float, console: Console, clock: Clock) -> None:
    """Show the server on the alternate screen until cancelled, or the user has enough."""
    state = State(client.url, interval_s)
    news = asyncio.Event()
    quits = False

    def quit_() -> None:
        nonlocal quits
        quits = True
        news.set()

    async def poll() -> None:
        while True:
            asked_at = clock()
            state.add(await client.ask(), clock())
            news.set()
            await asyncio.sleep(max(0.0, asked_at + interval_s - clock()))

    polling = asyncio.create_task(poll())
    polling.add_done_callback(lambda _: news.set())
    try:
        with listening(quit_), Live(console=console, screen=True, auto_refresh=False) as live:
            while not quits and not polling.done():
                width, height = console.size
                live.update(render(state, width, height, clock(), time.time()), refresh=True)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), _DRAW_S)
                news.clear()
    finally:
        polling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await polling  # else it only ends by a bug, which is raised here


async def snapshot(client: TopClient, interval_s: float, console: Console, clock: Clock) -> bool:
    """Print one view, with the rates of an interval; False if the server told nothing."""
    state = State(client.url, interval_s)
    state.add(await client.ask(), clock())
    if state.now is not None:
        await asyncio.sleep(interval_s)
        state.add(await client.ask(), clock())
    height = max(console.height, 24)
    console.print(render(state, console.width, height, clock(), time.time(), once=True))
    return state.now is not None
