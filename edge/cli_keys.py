"""The commands that concern the authority's keys and the key ring: `gatehouse ca …`, `gatehouse key-ring …`."""

from __future__ import annotations

from typing import Annotated

import typer

from edge.invocation import (
    ConfigOption,
    DataDirOption,
    JsonOption,
    command_group,
    configuration_of,
    finish,
    invocation_of,
)

authorities = command_group("The built-in certificate authority.")
key_ring = command_group("The keys that seal secrets in the database.")


@authorities.command("show")
def show_authorities(
    context: typer.Context, config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """The chain of the built-in CA, in PEM: what clients need to trust this server."""
    given = invocation_of(context, config, data_dir, as_json)
    loaded = configuration_of(given)

    from edge import commands

    finish(lambda: commands.show_authorities(loaded, as_json=given.as_json))


@authorities.command("rollover")
def roll_over_authority(
    context: typer.Context, config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Make a new issuing authority below the same root; what the old one issued stays valid."""
    given = invocation_of(context, config, data_dir, as_json)
    loaded = configuration_of(given)

    from edge import commands

    finish(lambda: commands.roll_over_authority(loaded, as_json=given.as_json))


@key_ring.command("rotate")
def rotate_sealing_key(
    context: typer.Context,
    key: Annotated[
        str | None, typer.Option("--key", metavar="ID", help="A key that was staged; else a new one is made.")
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Seal every secret of the database again, under another key."""
    given = invocation_of(context, config, data_dir, as_json)
    loaded = configuration_of(given)

    from edge import commands

    finish(lambda: commands.rotate_sealing_key(loaded, key, as_json=given.as_json))


@key_ring.command("stage")
def stage_sealing_key(
    context: typer.Context,
    key: Annotated[str | None, typer.Option("--key", metavar="ID", help="Its id; else one is chosen.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a key without using it yet, to be copied to nodes with files of their own before `rotate`."""
    given = invocation_of(context, config, data_dir, as_json)
    loaded = configuration_of(given)

    async def work() -> None:
        from edge import commands

        commands.stage_sealing_key(loaded, key, as_json=given.as_json)

    finish(work)


@key_ring.command("drop")
def drop_sealing_key(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="ID")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a key out of the ring once nothing rests under it."""
    given = invocation_of(context, config, data_dir, as_json)
    loaded = configuration_of(given)

    from edge import commands

    finish(lambda: commands.drop_sealing_key(loaded, key, as_json=given.as_json))


@key_ring.command("show")
def show_key_ring(
    context: typer.Context, config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Where the key ring is and the ids of its keys; never a key."""
    given = invocation_of(context, config, data_dir, as_json)
    loaded = configuration_of(given)

    async def work() -> None:
        from edge import commands

        commands.show_key_ring(loaded, as_json=given.as_json)

    finish(work)
