"""What a command says that cannot be done."""

from __future__ import annotations

import pytest

from apv_fast.cli import main


def refused(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with that cannot be done."""
    capsys.readouterr()
    assert main(command.split()) == 1, command
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith(f"apv-fast {command.split()[0]}: ")
    return last
