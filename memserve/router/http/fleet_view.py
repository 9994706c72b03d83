"""GET /v1/workers: the instances as JSON, with names for the numbers that travel without."""

from __future__ import annotations

import msgspec

from memserve.router.engine_api import InstanceStatus


class WorkerLoad(msgspec.Struct, frozen=True):
    """What an instance does now: requests by state, offers that wait to be pulled, blocks by state; and what
    it has done in this life: preemptions, forward passes, tokens computed by phase.
    """

    running: int
    waiting: int
    pulling: int
    offers: int
    oldest_offer_s: float
    num_blocks: int
    free_blocks: int
    active_blocks: int
    historical_blocks: int
    num_host_blocks: int
    historical_host_blocks: int
    preemptions: int
    steps: int
    prefill_tokens: int
    decode_tokens: int


class WorkerObject(msgspec.Struct, frozen=True):
    """A row. `incarnation` counts its lives from 0, `restarts` how often it came up again; `pulls_from` says
    by which transport KV comes from each other worker. `max_host_blocks`: most that its host tier may have.
    """

    id: str
    role: str
    state: str
    incarnation: int
    restarts: int
    load: WorkerLoad
    pulls_from: dict[str, str]
    block_bytes: int
    max_host_blocks: int
    object: str = "worker"


class WorkerList(msgspec.Struct, frozen=True):
    data: list[WorkerObject]
    object: str = "list"


def worker_list(instances: tuple[InstanceStatus, ...]) -> WorkerList:
    """One row an instance, in the order of the plan."""
    return WorkerList([_row(status) for status in instances])


def _row(status: InstanceStatus) -> WorkerObject:
    load = status.load
    return WorkerObject(
        id=status.instance,
        role=status.role.value,
        state=status.state.value,
        incarnation=status.incarnation,
        restarts=status.num_restarts,
        load=WorkerLoad(
            running=load.num_running,
            waiting=load.num_waiting,
            pulling=load.num_pulling,
            offers=load.num_offers,
            oldest_offer_s=load.oldest_offer_s,
            num_blocks=status.num_blocks,
            free_blocks=load.num_free_blocks,
            active_blocks=load.num_active_blocks,
            historical_blocks=load.num_historical_blocks,
            num_host_blocks=load.num_host_blocks,
            historical_host_blocks=load.num_host_historical_blocks,
            preemptions=load.num_preemptions,
            steps=load.num_steps,
            prefill_tokens=load.num_prefill_tokens,
            decode_tokens=load.num_decode_tokens,
        ),
        pulls_from=dict(status.pulls_from),
        block_bytes=status.block_bytes,
        max_host_blocks=status.max_host_blocks,
    )
