"""A worker that computes nothing: it speaks the whole protocol and answers at once, with arbitrary tokens.

Started by the supervisor in a worker's place (`router.py`). It sends what a real worker sends in the same
places, each message in a write of its own: `Stored` for every block that fills, the offer and `Pulled` of a
hand-off, one `StepOutputs` a step for all that run, `Removed` for what leaves its pool, which forgets the
oldest request first. The first token of a request comes without waiting; then steps so far apart that
`--tokens-per-s` are drawn in all, or as fast as the router reads (0).
"""

from __future__ import annotations

import argparse
import itertools
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from memserve.messages import (  # noqa: E402
    FRAME_HEADER,
    NO_CACHED_TOKENS,
    BlockRefs,
    Cancel,
    Decode,
    FinishReason,
    Heartbeat,
    Init,
    Load,
    Loaded,
    Measure,
    Measured,
    Offer,
    Output,
    Prefill,
    Prefilled,
    PullBack,
    Pulled,
    PulledBack,
    Ready,
    Removed,
    Repeat,
    Shutdown,
    StepOutputs,
    Stored,
    Tier,
    ToRouter,
    ToWorker,
    decode_to_worker,
    encode_frame,
    num_packed,
)

HEARTBEAT_S = 1.0


@dataclass(slots=True)
class Running:
    """A request that decodes here, `num_tokens` long by now."""

    request: Decode
    num_tokens: int
    num_drawn: int
    num_blocks: int = 0
    blocks: list[int] = field(default_factory=list)


_TOKENIZER_SIZE = 4096


class InstantWorker:
    """See the module."""

    def __init__(self, control: socket.socket, tokens_per_s: float) -> None:
        self._control = control
        self._token_s = 1 / tokens_per_s if tokens_per_s else 0.0
        self._received = bytearray()
        self._running: dict[str, Running] = {}
        self._began: list[Running] = []
        self._held: deque[list[int]] = deque()  # blocks of what has ended, the oldest first
        self._draws = itertools.count()
        self._num_steps = 0

    def start(self) -> None:
        """The handshake."""
        init = None
        while init is None:
            self._receive()
            init = next(iter(self._messages()), None)
        assert isinstance(init, Init)
        self._incarnation, config = init.incarnation, init.config
        self._name, self._block_size = config.instance, config.block_size
        self._num_blocks = config.num_blocks or 1 << 16
        self._free = deque(range(self._num_blocks))
        # Ids beyond the bundled tokenizer's have no text: answers of them would be no trouble to remember.
        self._vocab_size = min(config.model.vocab_size, _TOKENIZER_SIZE)
        if init.weights_manifest is None:
            self._send(Loaded(b"nothing"))
        ready = Ready(self._num_blocks, self._block_size, config.max_model_len, "none", "cpu", "none", 0.0)
        self._send(ready)

    def run(self) -> None:
        """Until Shutdown, or the end of the socket."""
        next_step = next_beat = time.monotonic()
        while True:
            now = time.monotonic()
            until = min(next_beat, next_step) if self._running else next_beat
            if select.select([self._control], [], [], max(0.0, until - now))[0]:
                if not self._receive():
                    return
                for message in self._messages():
                    if isinstance(message, Shutdown):
                        return
                    self._take(message)
            now = time.monotonic()
            if self._began:
                self._draw(self._began)
                self._began = []
            if self._running and now >= next_step:
                batch = list(self._running.values())
                self._draw(batch)
                next_step = max(next_step, now - 0.01) + self._token_s * len(batch)
            if now >= next_beat:
                self._send(Heartbeat(self._num_steps, 0.0, self._load()))
                next_beat = now + HEARTBEAT_S

    # --- requests ---

    def _take(self, message: ToWorker) -> None:
        match message:
            case Decode():
                num_tokens = num_packed(message.token_ids)
                if message.offer is not None:
                    there = message.offer.num_tokens
                    self._send(Pulled(message.request_id, message.attempt, there, 0, 1 << 20, 0.1, None))
                running = Running(message, num_tokens, num_tokens - message.num_prompt_tokens)
                self._running[message.request_id] = running
                self._began.append(running)
            case Prefill():
                self._prefill(message)
            case Measure():
                self._send(Measured(message.command_id, (Repeat(1.0),) * message.num_repeats))
            case PullBack():
                self._send(PulledBack(message.request_id, 0, 0, "nothing is kept here"))
            case Cancel():
                running_or_none = self._running.pop(message.request_id, None)
                if running_or_none is not None:
                    self._held.append(running_or_none.blocks)

    def _prefill(self, message: Prefill) -> None:
        num_tokens = num_packed(message.token_ids)
        refs = self._refs(self._allocate(-(-num_tokens // self._block_size)))
        if message.tell_blocks:
            layers_from = 0 if message.tell_layers else None
            self._send(Stored(message.request_id, message.attempt, 0, refs, layers_from))
        ends = message.sampling.max_tokens <= 1
        self._send(
            Prefilled(
                request_id=message.request_id,
                attempt=message.attempt,
                token_id=self._token(),
                logprobs=None,
                prompt_logprobs=None,
                cached=NO_CACHED_TOKENS,
                finish_reason=FinishReason.LENGTH if ends else None,
                offer=None if ends else Offer(refs, num_tokens),
                load=self._load(),
            )
        )
        self._held.append(list(refs.blocks))

    def _draw(self, batch: list[Running]) -> None:
        """One step."""
        outputs = []
        for each in batch:
            request = each.request
            if request.request_id not in self._running:
                continue
            self._store(each)
            each.num_tokens += 1
            each.num_drawn += 1
            ends = each.num_drawn >= request.sampling.max_tokens
            outputs.append(
                Output(
                    request.request_id,
                    request.attempt,
                    (self._token(),),
                    finish_reason=FinishReason.LENGTH if ends else None,
                    cached=NO_CACHED_TOKENS if each.num_drawn == 1 else None,
                )
            )
            if ends:
                del self._running[request.request_id]
                self._held.append(each.blocks)
        self._num_steps += 1
        self._send(StepOutputs(tuple(outputs), self._load()))

    def _store(self, running: Running) -> None:
        """The blocks that are full now."""
        first, full = running.num_blocks, running.num_tokens // self._block_size
        if full > first:
            blocks = self._allocate(full - first)
            running.blocks += blocks
            running.num_blocks = full
            request = running.request
            self._send(Stored(request.request_id, request.attempt, first, self._refs(blocks)))

    # --- blocks ---

    def _allocate(self, count: int) -> list[int]:
        while len(self._free) < count:
            gone = self._held.popleft()
            if gone:
                self._send(Removed(self._refs(gone), None))
            self._free.extend(gone)
        return [self._free.popleft() for _ in range(count)]

    def _refs(self, blocks: list[int]) -> BlockRefs:
        return BlockRefs(self._name, self._incarnation, Tier.DEVICE, tuple(blocks), (1,) * len(blocks))

    # --- the rest ---

    def _token(self) -> int:
        return 259 + next(self._draws) * 7919 % (self._vocab_size - 259)

    def _load(self) -> Load:
        return Load(num_running=len(self._running), num_steps=self._num_steps)

    def _send(self, message: ToRouter) -> None:
        self._control.sendall(encode_frame(message, self._incarnation))

    def _receive(self) -> bool:
        data = self._control.recv(1 << 18)
        self._received += data
        return bool(data)

    def _messages(self) -> list[ToWorker]:
        found, at = [], 0
        while len(self._received) - at >= FRAME_HEADER.size:
            num_bytes, _ = FRAME_HEADER.unpack_from(self._received, at)
            end = at + FRAME_HEADER.size + num_bytes
            if len(self._received) < end:
                break
            found.append(decode_to_worker(bytes(self._received[at + FRAME_HEADER.size : end])))
            at = end
        del self._received[:at]
        return found


def main() -> None:
    """Run on the descriptors that the supervisor passes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", type=int, default=None)
    parser.add_argument("--tokens-per-s", type=float, default=0.0)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--grants-fd", type=int, required=True)
    parser.add_argument("--title", required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if args.cpu is not None:
        os.sched_setaffinity(0, {args.cpu})
    control = socket.socket(fileno=args.control_fd)
    control.setblocking(True)
    worker = InstantWorker(control, args.tokens_per_s)
    worker.start()
    worker.run()


if __name__ == "__main__":
    main()
