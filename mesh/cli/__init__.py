"""The command ``mesh``. Only here is a terminal written to; nothing below imports this."""

from __future__ import annotations

import secrets
import sys

import click

import mesh


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


def main() -> None:
    """The entry point: Ctrl-C ends it quietly, with the shell's usual status."""
    try:
        status = commands.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(status)
