"""What the router tells a worker: who it is, which requests to run and how, what to pull, what to forget."""

from __future__ import annotations

from memserve.config import WorkerConfig
from memserve.messages.base import Message
from memserve.messages.blocks import BlockRefs, Offer
from memserve.messages.commands import CacheCommand, Measure
from memserve.messages.links import LinkMessage
from memserve.messages.sequences import SamplingParams


class Init(Message, frozen=True, array_like=True, tag=True, gc=False):
    """First message on a connection: who the worker is and what it runs.

    `weights_manifest` is None for the worker that loads the weights and lays them out for the others (it
    answers `Loaded`); the others get the manifest of what lies in the shared weights memfd. On a GPU it is
    empty if the weights are granted, and None if the worker is to load its own.
    """

    config: WorkerConfig
    incarnation: int
    weights_manifest: bytes | None = None


class Prefill(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Compute the KV of `token_ids`, draw one token, answer `Prefilled`, keep the blocks locked until
    `Release`.

    `token_ids` are the prompt and, on a replay, the tokens drawn so far; `num_prompt_tokens` says where the
    prompt ends (penalties, max_tokens and logprobs count from there). With `tell_blocks` every block is told
    by `Stored` as soon as it is complete, so that it can be pulled while the rest is computed; with
    `tell_layers` already when the step begins that will complete it. `offer` is KV to be had elsewhere.
    """

    request_id: str
    attempt: int
    token_ids: bytes
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_salt: str = ""
    tell_blocks: bool = False
    tell_layers: bool = False
    offer: Offer | None = None


class Reserve(Message, frozen=True, array_like=True, tag=True, gc=False):
    """A request with these tokens is being prefilled elsewhere and will decode here: keep what is cached of
    it, and expect `PullAhead` of the rest. Only a hint; ended by its `Decode` or by `Cancel`.
    """

    request_id: str
    attempt: int
    token_ids: bytes
    cache_salt: str = ""


class PullAhead(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Blocks of a request that was reserved: start to pull them, from block `first_block` of the sequence on.
    Only a hint: what is not pulled ahead is pulled, or recomputed, with the `Decode`. With `layers_from` they
    are being computed (see `Stored`).
    """

    request_id: str
    attempt: int
    first_block: int
    refs: BlockRefs
    layers_from: int | None = None


class Decode(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Run a request to its end: pull what `offer` holds, compute what is lacking, stream the rest.

    Without an offer it is a colocated run (prefill and decode in one place), or a replay. With `tell_blocks`
    every block is told by `Stored` once it is complete.
    """

    request_id: str
    attempt: int
    token_ids: bytes
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_salt: str = ""
    tell_blocks: bool = False
    offer: Offer | None = None


class PullBack(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Another instance has computed what continues a prefix cached here: pull it, if there is room, and cache
    it too (MemServe §Context caching, PD-Caching-3). `token_ids` are whole blocks, `refs` those from block
    `first_block` on; nothing keeps them but their generations. Answered by `PulledBack`.
    """

    request_id: str
    token_ids: bytes
    cache_salt: str
    first_block: int
    refs: BlockRefs


class Cancel(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Forget this attempt in whatever phase it is and give its blocks back. Unknown ids are ignored."""

    request_id: str
    attempt: int


class Release(Message, frozen=True, array_like=True, tag=True, gc=False):
    """The offer of this attempt was pulled or is no longer wanted: unlock its blocks. Unknown ids are
    ignored.
    """

    request_id: str
    attempt: int


class Shutdown(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Stop the loop and exit with status 0; what still runs is dropped (the router drains first)."""


ToWorker = (
    Init
    | Prefill
    | Reserve
    | PullAhead
    | Decode
    | PullBack
    | CacheCommand
    | Measure
    | Cancel
    | Release
    | Shutdown
    | LinkMessage
)
