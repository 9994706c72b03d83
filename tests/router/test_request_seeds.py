"""Seeds of requests that bring none."""

from __future__ import annotations

from memserve.router.request_seeds import NUM_SEEDS, RequestSeeds


def take(seeds: RequestSeeds, count: int = 100) -> list[int]:
    return [seeds.next() for _ in range(count)]


def test_the_same_server_seed_gives_the_same_sequence() -> None:
    assert take(RequestSeeds(7)) == take(RequestSeeds(7))
    drawn = [*take(RequestSeeds(7)), *take(RequestSeeds(8)), *take(RequestSeeds()), *take(RequestSeeds())]
    assert len(set(drawn)) == 400
    assert all(0 <= seed < NUM_SEEDS for seed in drawn)


def test_every_seed_of_the_command_line_will_do() -> None:
    assert take(RequestSeeds(0)) != take(RequestSeeds(NUM_SEEDS - 1))
