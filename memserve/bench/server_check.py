"""Before a run: is the server there, what is its model called, and which fields does it take?

One small request in the form that the run will use. A server that refuses `ignore_eos` or `stream_options`
(400, 422) is asked again without, and the run does without; any other failure ends the benchmark with one
line, before anything was measured.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

from memserve.bench.client import Client
from memserve.bench.records import ErrorKind, RequestRecord
from memserve.bench.request_format import RequestFormat
from memserve.bench.workload import Piece, Workload, expand
from memserve.errors import BenchError

_PROBE_TOKENS = 8
_PROBE_TEXT = "Hello, how are you?"
_REFUSED = (400, 422)


@dataclass(frozen=True, slots=True)
class Checked:
    """A server that answers requests of this format. `notes`: what a reader of the figures must know."""

    format: RequestFormat
    notes: tuple[str, ...]


async def model_name(client: Client) -> str:
    """The name of the server's first model. Raises BenchError."""
    names = await client.models()
    if not names:
        raise BenchError(f"{client.url} has no model")
    return names[0]


async def check_server(client: Client, wanted: RequestFormat, workload: Workload, *, live: bool) -> Checked:
    """Find the fullest format that the server takes. Raises BenchError."""
    wanted = dataclasses.replace(wanted, token_ids=live and not workload.is_text)
    piece = _probe(workload)
    started = time.perf_counter()
    for request_format in wanted.plainer():
        record = RequestRecord(session="check", turn=0, max_tokens=2, scheduled_at=0.0)
        answer = await client.send(
            request_format.path,
            request_format.body([piece], 2),
            record,
            lambda: time.perf_counter() - started,
            keep=True,
        )
        if record.error is None or record.status not in _REFUSED:
            break
    if record.error is not None and record.error.kind is not ErrorKind.EMPTY:
        raise BenchError(f"{client.url} fails a first small request: {record.error.message}")
    if request_format.token_ids and not answer.token_ids:
        raise BenchError("live answers to token ids need a server that knows return_token_ids")
    return Checked(request_format, tuple(_notes(wanted, request_format, record)))


def _probe(workload: Workload) -> Piece:
    if workload.is_text:
        return _PROBE_TEXT
    ids = expand(workload.sessions[0].turns[0].input)
    return tuple(token for token in ids[:_PROBE_TOKENS] if not isinstance(token, str))


def _notes(wanted: RequestFormat, used: RequestFormat, record: RequestRecord) -> list[str]:
    notes = []
    if wanted.ignore_eos and not used.ignore_eos:
        notes.append("the server refuses ignore_eos: answers may be shorter than asked for")
    if wanted.include_usage and not used.include_usage:
        notes.append("the server refuses stream_options")
    if not record.has_usage:
        notes.append("the server sends no usage: a chunk counts as a token, and prompt tokens are not known")
    elif record.cached_tokens is None:
        notes.append("the server does not tell cached tokens")
    return notes
