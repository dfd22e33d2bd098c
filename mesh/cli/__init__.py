"""The command ``mesh``. Only here is a terminal written to; nothing below imports this."""

from __future__ import annotations

import secrets
import sys

import click

import mesh
from mesh.errors import MeshError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mesh.__version__, prog_name="mesh")
def commands() -> None:
    """Brokerless messaging between processes on one machine or one LAN."""


@commands.command()
@click.option(
    "--seconds",
    type=click.FloatRange(1, 3600),
    default=8.0,
    show_default=True,
    help="How long the sensors run.",
)
def demo(seconds: float) -> None:
    """Run several processes that find each other over mDNS, and check what they exchange.

    Everything stays on the loopback interface. Exits with 0 only if every check holds.
    """
    from mesh.cli.demo import run

    sys.exit(0 if run(seconds) else 1)


@commands.command()
def secret() -> None:
    """Print a new secret for a realm: 192 random bits."""
    click.echo(secrets.token_urlsafe(24))


@commands.command()
@click.argument("directory")
@click.option("--name", default="sidecar", show_default=True, help="What the node is called.")
@click.option("--realm", help="Whose streams it keeps. Default: $MESH_REALM, or 'default'.")
def sidecar(directory: str, name: str, realm: str | None) -> None:
    """Keep streams in DIRECTORY, until it is interrupted.

    All nodes of its realm find it. The secret of a network's realm is read from $MESH_SECRET, and
    addresses to dial from $MESH_SEEDS.
    """
    from mesh.cli.sidecar import run

    run(directory, name, realm)


@commands.group()
def log() -> None:
    """Look after the logs of streams."""


@log.command()
@click.argument("directory")
def check(directory: str) -> None:
    """Say what is amiss in DIRECTORY, a sidecar's.

    Reads every batch of every stream. Changes nothing, and may run beside the sidecar. Exits with 1
    if anything is amiss.
    """
    from mesh.cli.log import check as run

    sys.exit(0 if run(directory) else 1)


@log.command()
@click.argument("stream")
@click.option("--realm", help="Default: $MESH_REALM, or 'default'.")
@click.option(
    "--timeout",
    type=float,
    default=5.0,
    show_default=True,
    help="How long to look for sidecars, in seconds.",
)
def stats(stream: str, realm: str | None, timeout: float) -> None:
    """Say what STREAM holds, and how far its groups are.

    Asks each sidecar that has it. Reads $MESH_SECRET and $MESH_SEEDS, as `mesh sidecar` does.
    """
    from mesh.cli.log import stats as run

    run(stream, realm, timeout)


@log.command()
@click.argument("stream")
@click.option("--realm", help="Default: $MESH_REALM, or 'default'.")
@click.option(
    "--timeout",
    type=float,
    default=10.0,
    show_default=True,
    help="It ends after so many seconds without a dead letter.",
)
def redrive(stream: str, realm: str | None, timeout: float) -> None:
    """Append dead letters of STREAM to it again.

    Once each, and ends when there are no more. All its groups get them, with their payload, key and
    headers, and acknowledge them anew. Reads $MESH_SECRET and $MESH_SEEDS, as `mesh sidecar` does.
    """
    from mesh.cli.log import redrive as run

    run(stream, realm, timeout)


def main() -> None:
    """The entry point: Ctrl-C ends it quietly, with the shell's usual status."""
    try:
        status = commands.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except (MeshError, OSError) as error:
        click.echo(f"mesh: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(status)
