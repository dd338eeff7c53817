"""The OpenAPI 3.1 document, written from the operations (operations.py) and the types that decode and encode them.

Schemas are msgspec's own JSON Schema of those types. What every operation of a kind may answer is said here once: who
needs a credential may get 401 and 403, who sends a body 408, 413 and 415, who names an object 404, everybody 400, 414,
429, 431, 500 and 503. What is no HTTP request at all is refused in the same shape and belongs to no operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, assert_never

import msgspec

from adapters.http.access import ACCESS, DeviceOr, Public
from adapters.http.errors import ErrorBody
from adapters.http.operations import Media, Operation, Reply, path_parameters
from registry.model import Json
from registry.permissions import Permission

_REF: Final = "#/components/schemas/{name}"

_PATH_PARAMETERS: Final[Mapping[str, Json]] = {
    "device_id": {"type": "string", "format": "uuid"},
    "credential_id": {"type": "string", "format": "uuid"},
    "session_id": {"type": "string", "format": "uuid"},
    "command_id": {"type": "string", "format": "uuid"},
    "profile_id": {"type": "string", "minLength": 1},
    "template_id": {"type": "string", "minLength": 1},
    "token_id": {"type": "string", "format": "uuid"},
    "fingerprint": {"type": "string", "minLength": 1},
}
"""What is no UUID where one belongs names nothing, so it is NOT_FOUND, as any unknown id."""

_REFUSALS: Final[Mapping[int, tuple[str, str, str]]] = {
    400: ("BadRequest", "INVALID_ARGUMENT, or FAILED_PRECONDITION", "INVALID_ARGUMENT"),
    401: ("Unauthenticated", "UNAUTHENTICATED, whatever the reason", "UNAUTHENTICATED"),
    403: ("PermissionDenied", "PERMISSION_DENIED", "PERMISSION_DENIED"),
    404: ("NotFound", "NOT_FOUND: no such object in the caller's tenant", "NOT_FOUND"),
    409: ("AlreadyExists", "ALREADY_EXISTS", "ALREADY_EXISTS"),
    408: ("TooSlow", "INVALID_ARGUMENT: the request came too slowly", "INVALID_ARGUMENT"),
    412: ("PreconditionFailed", "FAILED_PRECONDITION: If-Match names another version", "FAILED_PRECONDITION"),
    413: ("TooLarge", "INVALID_ARGUMENT: the body is larger than is served", "INVALID_ARGUMENT"),
    414: ("TargetTooLong", "INVALID_ARGUMENT: path and query are longer than is served", "INVALID_ARGUMENT"),
    415: ("UnsupportedMediaType", "INVALID_ARGUMENT: the body's type is not served", "INVALID_ARGUMENT"),
    429: ("TooMany", "RESOURCE_EXHAUSTED: a limit or a quota", "RESOURCE_EXHAUSTED"),
    431: ("HeadersTooLarge", "INVALID_ARGUMENT: the headers are larger than is served", "INVALID_ARGUMENT"),
    500: ("Internal", "INTERNAL: our bug; the correlation id finds it in the log", "INTERNAL"),
    503: ("Unavailable", "UNAVAILABLE: nothing was done, or nobody knows; try again", "UNAVAILABLE"),
}

_CORRELATION: Final[Json] = {
    "description": "Joins the answer with events, audit rows and logs",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]{8,64}$"},
}
_RETRY_AFTER: Final[Json] = {"description": "Seconds", "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"}}

_SECURITY_SCHEMES: Final[Json] = {
    "operator": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "EdDSA, aud=gatehouse"},
    "deviceBearer": {"type": "http", "scheme": "bearer", "bearerFormat": "sk_live_…"},
    "deviceKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "deviceCertificate": {"type": "mutualTLS", "description": "A registered client certificate of any issuer"},
    "enrolment": {
        "type": "http",
        "scheme": "basic",
        "description": "The password is a registration token or a template's key",
    },
    "ownCertificate": {"type": "mutualTLS", "description": "The certificate to be renewed, issued by this server"},
}

_OF_DEVICES: Final[Sequence[Json]] = ({"deviceBearer": []}, {"deviceKey": []}, {"deviceCertificate": []})

_TAGS: Final[Sequence[tuple[str, str]]] = (
    ("Devices", "Registered by hand, read, changed, deleted"),
    ("Credentials", "Issued, rotated, revoked; secrets are shown once"),
    ("Profiles", "What devices of one type have in common"),
    ("Provisioning", "Templates, and the claim of a device off the line"),
    ("Uplinks", "What devices send, and what they have sent"),
    ("Commands", "What goes down to devices: commands and configurations"),
    ("Sessions", "Who is connected"),
    ("Events", "What happened, and who did it"),
    ("Certificates", "Registration tokens, certificates of any issuer, the built-in authority and its lists"),
    ("EST", "Enrolment over Secure Transport (RFC 7030)"),
)


def document(operations: Iterable[Operation]) -> dict[str, Json]:
    """The document of these operations."""
    listed = list(operations)
    types = _Types(listed)
    paths: dict[str, dict[str, Json]] = {}
    for each in listed:
        paths.setdefault(each.base + each.path, {})[each.method.lower()] = _operation(each, types)
    for path, item in paths.items():
        names = path_parameters(path)
        if names:
            item["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": _PATH_PARAMETERS[name]} for name in names
            ]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Gatehouse",
            "version": "1",
            "description": "An IoT edge server that owns device identity. Every error is "
            '`{"code", "message", "correlation_id"}`; a method that a path does not serve is 405 with `Allow`. '
            "An `X-Correlation-ID` of 8 to 64 characters of A-Z a-z 0-9 _ - is taken over and sent back. "
            "The tenant is always the credential's; a body that names one has an unknown field.",
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS],
        "paths": paths,
        "components": {
            "schemas": types.schemas,
            "responses": {name: _refusal(status, types) for status, (name, _, _) in _REFUSALS.items()},
            "headers": {"X-Correlation-ID": _CORRELATION, "Retry-After": _RETRY_AFTER},
            "securitySchemes": _SECURITY_SCHEMES,
        },
    }


class _Types:
    """The schemas of all types, each said once."""

    def __init__(self, operations: list[Operation]) -> None:
        queries = {each.query for each in operations if each.query is not None}
        bodies: list[Any] = [ErrorBody]
        for each in operations:
            bodies += [each.body] if isinstance(each.body, type) else []
            bodies += [r.body for r in each.replies.values() if r.body is not None and not isinstance(r.body, Media)]
        wanted = list(dict.fromkeys([*bodies, *sorted(queries, key=lambda q: q.__name__)]))
        found, components = msgspec.json.schema_components(wanted, ref_template=_REF)
        self._found = dict(zip(wanted, found, strict=True))
        self._queries = {query: components.pop(self._name(query)) for query in queries}
        self.schemas: dict[str, Json] = components

    def schema(self, body: Any) -> Json:
        """The schema of a body's type."""
        return body.schema if isinstance(body, Media) else self._found[body]

    def parameters(self, query: type) -> list[Json]:
        """The parameters of a query's type."""
        described: list[Json] = []
        for name, schema in self._queries[query]["properties"].items():
            kept = {k: v for k, v in schema.items() if k != "description"}
            parameter = {"name": name, "in": "query", "required": False, "schema": kept}
            if "description" in schema:
                parameter["description"] = schema["description"]
            described.append(parameter)
        return described

    def _name(self, body: type) -> str:
        return str(self._found[body]["$ref"]).rpartition("/")[2]


def _operation(each: Operation, types: _Types) -> dict[str, Json]:
    described: dict[str, Json] = {
        "operationId": each.operation_id,
        "summary": each.summary,
        "tags": [each.tag],
        "security": _security(each),
        "responses": {str(status): _reply(reply, types) for status, reply in sorted(each.replies.items())},
    }
    if each.description or isinstance(ACCESS.get(each.operation_id), Permission):
        described["description"] = _description(each)
    parameters = [] if each.query is None else types.parameters(each.query)
    parameters += [
        {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in each.headers.items()
    ]
    if parameters:
        described["parameters"] = parameters
    if each.body is not None:
        described["requestBody"] = _request_body(each, types)
    for status in _refusals(each):
        described["responses"][str(status)] = {"$ref": f"#/components/responses/{_REFUSALS[status][0]}"}
    return described


def _description(each: Operation) -> str:
    access = ACCESS.get(each.operation_id)
    needs = f"Needs the permission `{access.value}`." if isinstance(access, Permission) else ""
    return " ".join(part for part in (each.description, needs) if part)


def _request_body(each: Operation, types: _Types) -> Json:
    content: dict[str, Json] = {}
    for media in each.body_media:
        content[media] = {"schema": types.schema(each.body)}
        if each.body_example is not None and media == "application/json":
            content[media]["example"] = each.body_example
    content |= {other.media_type: {"schema": other.schema} for other in each.other_bodies}
    return {"required": each.body_required, "content": content}


def _reply(reply: Reply, types: _Types) -> Json:
    described: dict[str, Json] = {
        "description": reply.description,
        "headers": {"X-Correlation-ID": {"$ref": "#/components/headers/X-Correlation-ID"}},
    }
    if reply.body is None:
        return described
    media = reply.body.media_type if isinstance(reply.body, Media) else "application/json"
    content: dict[str, Json] = {"schema": types.schema(reply.body)}
    if reply.example is not None:
        content["example"] = reply.example
    others = {other.media_type: {"schema": other.schema} for other in reply.other_bodies}
    return described | {"content": {media: content, **others}}


def _refusals(each: Operation) -> list[int]:
    statuses = {400, 414, 429, 431, 500, 503, *each.refusals}
    match ACCESS.get(each.operation_id):
        case Permission() | DeviceOr() | Public.DEVICE:
            statuses |= {401, 403}
        case Public.ENROLMENT | Public.RENEWAL:
            statuses.add(401)
        case Public.OPEN | Public.CLAIM | None:
            pass
        case unknown:
            assert_never(unknown)
    if each.body is not None:
        statuses |= {408, 413, 415}
    if path_parameters(each.path):
        statuses.add(404)
    return sorted(statuses)


def _refusal(status: int, types: _Types) -> Json:
    _, description, code = _REFUSALS[status]
    headers: dict[str, Json] = {"X-Correlation-ID": {"$ref": "#/components/headers/X-Correlation-ID"}}
    if status in (429, 503):
        headers["Retry-After"] = {"$ref": "#/components/headers/Retry-After"}
    if status == 401:
        headers["WWW-Authenticate"] = {"schema": {"type": "string"}}
    example = {"code": code, "message": "…", "correlation_id": "6f0d2c3b5a7e4c1d9b8a7f6e5d4c3b2a"}
    return {
        "description": description,
        "headers": headers,
        "content": {"application/json": {"schema": types.schema(ErrorBody), "example": example}},
    }


def _security(each: Operation) -> Json:
    match ACCESS.get(each.operation_id):
        case Permission():
            return [{"operator": []}]
        case Public.DEVICE:
            return [*_OF_DEVICES]
        case DeviceOr():
            return [{"operator": []}, *_OF_DEVICES]
        case Public.ENROLMENT:
            return [{"enrolment": []}]
        case Public.RENEWAL:
            return [{"ownCertificate": []}]
        case Public.OPEN | Public.CLAIM | None:
            return []
        case unknown:
            assert_never(unknown)
