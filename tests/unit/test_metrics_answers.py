"""HTTP answers on the metrics page: counted by template, method and status, their times in cumulative buckets."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from edge.metrics import LATENCY, MAX_ROUTES, Metrics

ROUTE = "/api/v1/devices/{device_id}/uplink"


def samples(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Values by (label values in the order of their names)."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == name
    }


def test_answers_are_counted_by_route_method_and_status() -> None:
    metrics = Metrics()
    for status in (202, 202, 401):
        metrics.http_answered(ROUTE, "POST", status, 0.001)
    assert samples(metrics, "gatehouse_http_requests_total") == {("POST", ROUTE, "202"): 2, ("POST", ROUTE, "401"): 1}


def test_times_are_in_cumulative_buckets_over_all_statuses() -> None:
    metrics = Metrics()
    for status, seconds in ((202, 0.001), (202, 0.0011), (503, 3.0), (202, 60.0)):
        metrics.http_answered(ROUTE, "POST", status, seconds)
    buckets = samples(metrics, "gatehouse_http_request_seconds_bucket")
    counts = [buckets[str(le), "POST", ROUTE] for le in LATENCY]
    assert counts == [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3]
    assert samples(metrics, "gatehouse_http_request_seconds_count") == {("POST", ROUTE): 4}
    (total,) = samples(metrics, "gatehouse_http_request_seconds_sum").values()
    assert abs(total - 63.0021) < 1e-9


def test_nothing_that_a_peer_chose_becomes_a_label() -> None:
    metrics = Metrics()
    for number in range(3 * MAX_ROUTES):
        metrics.http_answered(f"/{number}", f"BREW{number}", 1000 + number, 0.0)
    metrics.http_answered("", "GET", 404, 0.0)
    counted = samples(metrics, "gatehouse_http_requests_total")
    assert len(counted) <= MAX_ROUTES + 2
    assert {(method, status) for method, _, status in counted} == {("other", "other"), ("GET", "404")}
    assert sum(counted.values()) == 3 * MAX_ROUTES + 1


def test_what_is_there_now_is_no_counter() -> None:
    metrics = Metrics()
    metrics.watch_mqtt(lambda: {"stored": 7, "held": 2}, frozenset({"held"}))
    page = metrics.render().decode()
    assert 'gatehouse_mqtt_total{what="stored"} 7.0' in page
    assert 'gatehouse_mqtt_now{what="held"} 2.0' in page
    assert 'gatehouse_mqtt_total{what="held"}' not in page
