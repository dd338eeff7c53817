"""What a telemetry payload says: named values of sensors, perhaps with the time they were taken (CONTRACT §2).

    {"env.temperature": 21.5, "battery": 87}                             flat: every member is a reading
    {"observed_at": "2026-05-29T10:15:00Z", "values": {…flat…}}          dated
    [ flat or dated, … ]                                                 a backlog

Pure: decoded values in (from JSON or CBOR alike), readings out, InvalidArgument for anything else. A payload is taken
as a whole or refused as a whole; a message names the culprit and what is allowed.

Decisions, where the contract is silent:

- A name splits at its **last** dot: the sensor is the leaf and what stands before it addresses the component, so that
  `rack1.psu2.voltage` is the sensor `voltage` of the component `rack1.psu2`. Without a dot the component is `main`.
  Each of the two is 1–128 printable characters (no control, format or separator characters but the space).
- `values` and `observed_at` are the words of the dated form; alone they are no sensor names (they would be a mistake).
- `null` is "nothing to report" and gives no reading: a sensor that fails must not cost the readings of its neighbours.
  NaN and infinities, which only CBOR has, are refused: what is acknowledged is stored, and JSON cannot store them.
- Integers outside 64 bits are refused rather than rounded; a sender that can live with rounding writes `1.8e19`.
- Text is at most 4 KiB of UTF-8, without NUL, which PostgreSQL cannot keep.
- An object or array without members is refused: somebody forgot something.
- At most 1,000 members in one payload: a larger backlog is sent in several messages, each of which can be repeated.
- Times lie from 1970 to 2200. A device without a clock reports 1970 plus its uptime; that is kept as it says. Times in
  the future are kept too: only `received_at` is ours, and the table is partitioned by it.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, TypeAlias

import msgspec

from registry.errors import InvalidArgument
from registry.model import Json

Value: TypeAlias = "float | int | bool | str"

MAIN_COMPONENT = "main"
MAX_NAME = 128
"""Characters of a component's or a sensor's name; both stand in an index whose entries PostgreSQL limits to 2.7 KB."""
MAX_TEXT_BYTES = 4096
"""UTF-8 bytes of a text reading: a state or a message, no document (those are uplinks of another kind)."""
MAX_READINGS = 1000
"""Members of one payload; bounds the rows that one uplink puts into a batch."""
EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = datetime(2200, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_DATED_WORDS = frozenset({"observed_at", "values"})
_VALUES_ALLOWED = "allowed are numbers, true, false, text and null"
_SHOWN = 64
"""Characters of a peer's name that an error message repeats."""
_AwareDatetime = Annotated[datetime, msgspec.Meta(tz=True)]


class Reading(msgspec.Struct, frozen=True, gc=False):
    """One value of one sensor. `observed_at` is None where the payload does not say when."""

    component: str
    sensor: str
    observed_at: datetime | None
    value: Value
    """float: DOUBLE, int: BIGINT (64 bits), bool: BOOLEAN, str: TEXT."""


def parse_telemetry(payload: Json) -> list[Reading]:
    """The readings of a decoded payload, in its order; empty if all its values are null. Raises InvalidArgument."""
    readings: list[Reading] = []
    if type(payload) is dict:
        _take_object(payload, "telemetry", readings, 0)
        return readings
    if type(payload) is not list:
        raise InvalidArgument(f"telemetry is {_kind_of(payload)}; allowed are an object or an array of objects")
    if not payload:
        raise InvalidArgument("telemetry is an empty array; allowed are 1 or more objects")
    members = 0
    for index, entry in enumerate(payload):
        where = f"telemetry[{index}]"
        if type(entry) is not dict:
            raise InvalidArgument(f"{where} is {_kind_of(entry)}; allowed are objects")
        members = _take_object(entry, where, readings, members)
    return readings


def parse_time(value: Json, where: str) -> datetime:
    """An RFC 3339 text (or a datetime, which CBOR's tag 0 gives) as UTC. Raises InvalidArgument."""
    try:
        moment = msgspec.convert(value, _AwareDatetime)
    except msgspec.ValidationError:
        raise InvalidArgument(
            f"{where} is {_shown_value(value)}; allowed are RFC 3339 times such as 2026-05-29T10:15:00Z", field=where
        ) from None
    # Compared before it is converted: the conversion of year 1 or 9999 may overflow.
    if not EARLIEST <= moment <= LATEST:
        raise InvalidArgument(f"{where} is in the year {moment.year}; allowed are 1970 to 2200", field=where)
    return moment.astimezone(UTC)


def split_name(name: str) -> tuple[str, str]:
    """The component and the sensor of a member's name. Raises InvalidArgument."""
    component, dot, sensor = name.rpartition(".")
    if not dot:
        component = MAIN_COMPONENT
    if (
        0 < len(component) <= MAX_NAME
        and 0 < len(sensor) <= MAX_NAME
        and component.isprintable()
        and sensor.isprintable()
    ):
        return component, sensor
    raise InvalidArgument(
        f"{shown(name)} is no sensor name; allowed are <component>.<sensor> or <sensor>, "
        f"each 1 to {MAX_NAME} printable characters"
    )


def shown(text: str) -> str:
    """A peer's text for a message: quoted, shortened, and unable to forge a line."""
    return ascii(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _take_object(entry: dict[str, Json], where: str, readings: list[Reading], members: int) -> int:
    """Append the readings of one flat or dated object; the number of members seen so far."""
    observed_at = None
    if not _DATED_WORDS.isdisjoint(entry):
        if not entry.keys() <= _DATED_WORDS or type(entry.get("values")) is not dict:
            raise InvalidArgument(
                f'{where} has "observed_at" or "values" among others; '
                'allowed are {"observed_at": <RFC 3339 time>, "values": {…}} or an object of sensor names'
            )
        if entry.get("observed_at") is not None:
            observed_at = parse_time(entry["observed_at"], f"{where}.observed_at")
        entry, where = entry["values"], f"{where}.values"
    if not entry:
        raise InvalidArgument(f"{where} is empty; allowed are 1 to {MAX_READINGS} readings")
    members += len(entry)
    if members > MAX_READINGS:
        raise InvalidArgument(f"telemetry has more than {MAX_READINGS} readings; send it in several messages")
    for name, value in entry.items():
        if type(name) is not str:
            raise InvalidArgument(f"{where} has {_kind_of(name)} as a name; allowed are texts")
        component, sensor = split_name(name)
        checked = _checked_value(name, value)
        if checked is not None:
            readings.append(Reading(component, sensor, observed_at, checked))
    return members


def _checked_value(name: str, value: Json) -> Value | None:
    """The value of a reading, or None where there is nothing to report."""
    if value is None:
        return None
    kind = type(value)
    if kind is float:
        if not math.isfinite(value):
            raise InvalidArgument(f"{shown(name)} is NaN or infinite; allowed are finite numbers and null")
        return float(value)
    if kind is bool:
        return bool(value)
    if kind is int:
        if not _INT64_MIN <= value <= _INT64_MAX:
            raise InvalidArgument(
                f"{shown(name)} is an integer beyond 64 bits; allowed are {_INT64_MIN} to {_INT64_MAX}"
            )
        return int(value)
    if kind is str:
        return _checked_text(name, value)
    raise InvalidArgument(f"{shown(name)} is {_kind_of(value)}; {_VALUES_ALLOWED}")


def _checked_text(name: str, text: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidArgument(f"{shown(name)} has half of a surrogate pair; allowed is text in UTF-8") from None
    if size > MAX_TEXT_BYTES:
        raise InvalidArgument(f"{shown(name)} is a text of {size} bytes; allowed are up to {MAX_TEXT_BYTES}")
    if "\0" in text:
        raise InvalidArgument(f"{shown(name)} has a NUL character (\\u0000), which cannot be stored")
    return text


def _kind_of(value: object) -> str:
    """What a decoded value is, in words that a device's developer knows."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case dict():
            return "an object"
        case list() | tuple():
            return "an array"
        case bytes() | bytearray():
            return "a byte string"
        case _:
            return f"a {type(value).__name__}"


def _shown_value(value: Json) -> str:
    return shown(value) if isinstance(value, str) else _kind_of(value)
