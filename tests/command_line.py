"""The command line, in the process of a test."""

import sys

from sb3_flow.zoo import cli


def sb3_flow_main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["sb3-flow", *map(str, args)])
    cli.main()
