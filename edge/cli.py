"""The command `gatehouse`: names, options, exit codes.

Theory. Three options belong to every command and may stand before or after its name: `--config`, `--data-dir`,
`--json`. Each level of the line (program, group, command) takes them and what stands nearer to the command wins; the
sum is an `Invocation`. Only then is the configuration read, once, and handed down complete.

    0    done                         1    it failed, for the reason on the one line of standard error
    130  Ctrl-C                       2    a wrong command line or configuration; nothing was opened

How a command gets from its options to its work and to its end is in invocation.py. Standard output holds what was asked
for and nothing else. This file imports nothing heavy: `gatehouse --help` must not pay for a server.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from edge.cli_keys import authorities, key_ring
from edge.invocation import (
    FAILED,
    INTERRUPTED,
    WRONG_USAGE,
    ConfigOption,
    DataDirOption,
    Invocation,
    JsonOption,
    TenantOption,
    UsageProblem,
    command_group,
    configuration_of,
    end,
    finish,
    invocation_of,
    parse_duration,
    parsed,
    parsed_if_given,
)
from edge.terminal import complain

app = typer.Typer(
    name="gatehouse",
    help="An IoT edge server that owns device identity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tenants = command_group("Tenants: whose everything is.")
tokens = command_group("Operators' tokens for the HTTP API.")
devices = command_group("Devices and what they authenticate with.")
for name, group in (
    ("tenant", tenants),
    ("token", tokens),
    ("device", devices),
    ("ca", authorities),
    ("key-ring", key_ring),
):
    app.add_typer(group, name=name)


def main() -> NoReturn:
    """The program."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows its escape
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(list(arguments), prog_name="gatehouse", standalone_mode=False)
        sys.stdout.flush()
    except TyperException as error:
        complain(f"{error.format_message()}{_hint(error)}")
        return WRONG_USAGE
    except UsageProblem as error:
        complain(str(error))
        return WRONG_USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    return code if isinstance(code, int) else 0


# -- the whole program and its groups ----------------------------------------------------------------------------------


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"gatehouse {version('gatehouse')}\n")
        raise typer.Exit


@app.callback()
def gatehouse(
    context: typer.Context,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """An IoT edge server that owns device identity."""
    context.obj = Invocation(config, data_dir, as_json)


@tenants.callback()
@tokens.callback()
@devices.callback()
@authorities.callback()
@key_ring.callback()
def _nearer(
    context: typer.Context, config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    context.obj = invocation_of(context, config, data_dir, as_json)


# -- the server --------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    context: typer.Context, config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Prints one line of JSON when everything listens; logs go to standard error.
    """
    loaded = configuration_of(invocation_of(context, config, data_dir, as_json))

    async def work() -> int:
        from edge.serve import serve as serve_node

        return await serve_node(loaded)

    end(finish(work))


@app.command()
def demo(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="End after the story instead of serving on.")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what it does on a server of its own.

    Brings devices online, lets them report, throws one out; then prints commands to try and goes on serving.

    Keeps its data in ./gatehouse-data unless --data-dir or GATEHOUSE_DATA_DIR says otherwise, and reads a
    configuration file only if --config or GATEHOUSE_CONFIG names one.
    """
    given = invocation_of(context, config, data_dir, as_json)
    loaded = configuration_of(demo_invocation(given, os.environ))

    async def work() -> int:
        from edge.demo import tell

        return await tell(loaded, once=once)

    end(finish(work))


def demo_invocation(given: Invocation, environ: Mapping[str, str]) -> Invocation:
    """The same, but away from every default that a production node could be using on this machine."""
    config = given.config or (None if environ.get("GATEHOUSE_CONFIG") else Path(os.devnull))
    data_dir = given.data_dir
    if data_dir is None and given.config is None and not environ.get("GATEHOUSE_DATA_DIR"):
        data_dir = Path("gatehouse-data")
    return Invocation(config, data_dir, given.as_json)


@app.command("check-config")
def check_config(
    context: typer.Context, config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Show the configuration that would be used, secrets masked. Exit code 2 if it cannot be used."""
    given = invocation_of(context, config, data_dir, as_json)
    loaded = configuration_of(given)
    from edge.config import describe
    from edge.terminal import show_json, show_text

    described = describe(loaded)
    if given.as_json:
        show_json(described)
    else:
        show_text(_as_toml(described))


@app.command()
def migrate(
    context: typer.Context, config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Bring the database schema up to date. A starting server does the same by itself."""
    given = invocation_of(context, config, data_dir, as_json)
    loaded = configuration_of(given)

    from edge import commands

    finish(lambda: commands.migrate_schema(loaded, as_json=given.as_json))


# -- tenants and tokens ------------------------------------------------------------------------------------------------


@tenants.command("create")
def create_tenant(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What people call it.")],
    slug: Annotated[
        str | None, typer.Option("--slug", metavar="SLUG", help="Its short name; made from NAME if not given.")
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a tenant; prints {"tenant_id", "slug"}."""
    loaded = configuration_of(invocation_of(context, config, data_dir, as_json))

    from edge import commands

    finish(lambda: commands.create_tenant(loaded, name, slug))


@tenants.command("list")
def list_tenants(
    context: typer.Context, config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """All tenants."""
    given = invocation_of(context, config, data_dir, as_json)
    loaded = configuration_of(given)

    from edge import commands

    finish(lambda: commands.list_tenants(loaded, as_json=given.as_json))


@tokens.command("mint")
def mint_token(
    context: typer.Context,
    tenant: Annotated[str, typer.Option("--tenant", metavar="SLUG", help="The tenant, by slug or id.")],
    role: Annotated[str, typer.Option("--role", metavar="ROLE", help="platform_admin, tenant_admin or member.")],
    permission: Annotated[
        list[str] | None,
        typer.Option("--permission", metavar="PERMISSION", help="What a member may do; may be repeated."),
    ] = None,
    ttl: Annotated[str, typer.Option("--ttl", metavar="TIME", help="How long it is valid: 90s, 15m, 1h, 7d.")] = "1h",
    subject: Annotated[
        str | None, typer.Option("--subject", metavar="NAME", help="Who it is for; else cli:<your user name>.")
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Mint an operator's token; prints the token and nothing else."""
    given = invocation_of(context, config, data_dir, as_json)
    from edge import commands

    lifetime = parse_duration("--ttl", ttl)
    parsed_role = parsed("--role", commands.parse_role, role)
    permissions = parsed("--permission", commands.parse_permissions, permission or ())
    loaded = configuration_of(given)

    async def work() -> None:
        await commands.mint_token(
            loaded,
            tenant=tenant,
            role=parsed_role,
            permissions=permissions,
            ttl=lifetime,
            subject=subject,
            as_json=given.as_json,
        )

    finish(work)


# -- devices -----------------------------------------------------------------------------------------------------------


@devices.command("list")
def list_devices(
    context: typer.Context,
    tenant: TenantOption = None,
    status: Annotated[str | None, typer.Option("--status", metavar="STATUS", help="active, offline, …")] = None,
    group: Annotated[str | None, typer.Option("--group", metavar="NAME")] = None,
    tag: Annotated[str | None, typer.Option("--tag", metavar="KEY[=VALUE]")] = None,
    profile_id: Annotated[str | None, typer.Option("--profile-id", metavar="ID")] = None,
    site_id: Annotated[str | None, typer.Option("--site-id", metavar="ID")] = None,
    gateway_id: Annotated[str | None, typer.Option("--gateway-id", metavar="ID")] = None,
    q: Annotated[
        str | None, typer.Option("--q", "-q", metavar="TEXT", help="Part of the name, or beginning of hardware_id.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=1_000_000, help="At most so many.")] = 100,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Devices of one tenant, or of all; every filter that is given must hold."""
    from edge import commands

    given = invocation_of(context, config, data_dir, as_json)
    query = commands.DeviceQuery(
        tenant,
        parsed_if_given("--status", commands.parse_status, status),
        group,
        tag,
        profile_id,
        site_id,
        parsed_if_given("--gateway-id", commands.parse_device_id, gateway_id),
        q,
        limit,
    )
    loaded = configuration_of(given)

    async def work() -> None:
        await commands.list_devices(loaded, query, as_json=given.as_json)

    finish(work)


@devices.command("show")
def show_device(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(metavar="DEVICE_ID")],
    tenant: TenantOption = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """One device and its credentials, without their secrets."""
    from edge import commands

    given = invocation_of(context, config, data_dir, as_json)
    wanted = parsed("DEVICE_ID", commands.parse_device_id, device_id)
    loaded = configuration_of(given)

    async def work() -> None:
        await commands.show_device(loaded, wanted, tenant, as_json=given.as_json)

    finish(work)


@devices.command("revoke")
def revoke_device(
    context: typer.Context,
    device_id: Annotated[str, typer.Argument(metavar="DEVICE_ID")],
    credential: Annotated[
        str | None, typer.Option("--credential", metavar="ID", help="Only this one; else every living one.")
    ] = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a device's credentials and close its sessions on all nodes; prints the receipt."""
    from edge import commands

    given = invocation_of(context, config, data_dir, as_json)
    wanted = parsed("DEVICE_ID", commands.parse_device_id, device_id)
    only = parsed_if_given("--credential", commands.parse_credential_id, credential)
    loaded = configuration_of(given)

    async def work() -> None:
        await commands.revoke_device(loaded, wanted, only, tenant, as_json=given.as_json)

    finish(work)


def _as_toml(described: Mapping[str, Any]) -> str:
    """A configuration file that says the same; what has no value stands there as a comment."""
    lines = [_toml_line(name, value) for name, value in described.items() if not isinstance(value, dict)]
    for section, keys in described.items():
        if isinstance(keys, dict):
            lines += ["", f"[{section}]", *(_toml_line(name, value) for name, value in keys.items())]
    return "\n".join(lines)


def _toml_line(name: str, value: object) -> str:
    # JSON's text, numbers, booleans and lists of texts are written the same way in TOML.
    return f"# {name} is not set" if value is None else f"{name} = {json.dumps(value)}"


def _hint(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see {context.command_path} --help)" if context is not None else ""


__all__ = ["Invocation", "UsageProblem", "app", "demo_invocation", "main", "parse_duration", "run"]
