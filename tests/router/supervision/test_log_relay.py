"""Lines from a pipe, whole."""

from __future__ import annotations

import asyncio
import os

from memserve.router.supervision.log_relay import MAX_LINE_BYTES, LogRelay


async def test_lines_come_out_whole_and_the_rest_at_the_end() -> None:
    lines: list[str] = []
    relay = LogRelay(lines.append)
    os.write(relay.write_fd, "one\ntwö".encode()[:-1])
    while not lines:
        await asyncio.sleep(0)
    assert lines == ["one"]
    os.write(relay.write_fd, "ö".encode()[1:] + b"\nbad \xff\nlast")
    while len(lines) < 3:
        await asyncio.sleep(0)
    relay.close()
    assert lines == ["one", "twö", "bad \ufffd", "last"]


async def test_a_line_without_end_is_broken() -> None:
    lines: list[str] = []
    relay = LogRelay(lines.append)
    os.write(relay.write_fd, b"x" * MAX_LINE_BYTES)  # what a pipe holds
    relay.close()
    assert "".join(lines) == "x" * MAX_LINE_BYTES
