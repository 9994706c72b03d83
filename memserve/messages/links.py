"""Forming a link of the transport torch_distributed: worker → router → worker, either way.

The receiver of KV asks (`Connect`), the source comes (`Accept`) or does not (`Refuse`). The router only
passes them on, or refuses for a source that is not there.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from memserve.messages.base import Message

# Of a link's secret, and at most of what gloo says of where it listens (170 bytes were seen).
LINK_TOKEN_BYTES = 32
_MAX_LINK_ADDRESS_BYTES = 4096
LinkToken = Annotated[bytes, msgspec.Meta(min_length=LINK_TOKEN_BYTES, max_length=LINK_TOKEN_BYTES)]
LinkAddress = Annotated[bytes, msgspec.Meta(max_length=_MAX_LINK_ADDRESS_BYTES)]


class Connect(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Receiver → source: meet me at `address`, to send me the blocks that I ask for.

    One pair is formed for each `attempt`; of two, the later counts. `token` is the pair's secret, to which
    each end holds the other before it believes or sends anything; never to be logged. `layout` (in words),
    `block_bytes` and `fingerprint` are the receiver's KV.
    """

    receiver: str
    receiver_incarnation: int
    source: str
    source_incarnation: int
    attempt: int
    address: LinkAddress
    token: LinkToken
    layout: str
    block_bytes: int
    fingerprint: str


class Accept(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Source → receiver: I come to the pair of this attempt, from `address`."""

    receiver: str
    receiver_incarnation: int
    source: str
    source_incarnation: int
    attempt: int
    address: LinkAddress


class Refuse(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Source → receiver, or the router for a source that is not there: no pair for this attempt."""

    receiver: str
    receiver_incarnation: int
    source: str
    source_incarnation: int
    attempt: int
    reason: str


LinkMessage = Connect | Accept | Refuse
