"""One million mutated packets: the MQTT wire raises nothing but its declared error.

Seeded and in chunks, so that a failure names its chunk and comes again; the unit tests run a smaller share.
"""

from __future__ import annotations

import pytest

from tests.fuzz.mqtt_judge import survives
from tests.fuzz.mqtt_packets import mutants
from tests.fuzz.mqtt_server import noise

CHUNKS = 20
CHUNK = 50_000


@pytest.mark.parametrize("seed", range(1, CHUNKS + 1))
def test_a_chunk_of_a_million_mutated_packets(seed: int) -> None:
    decoded = sum(survives(version, data) > 0 for version, data in mutants(seed, CHUNK))
    assert CHUNK * 0.05 < decoded < CHUNK  # the mutator still makes both kinds


@pytest.mark.parametrize("seed", range(1, 5))
def test_connections_survive_noise_without_an_exception(seed: int) -> None:
    thrown, hardy = noise(seed, 5_000)
    assert thrown > 20_000
    assert hardy > 200
