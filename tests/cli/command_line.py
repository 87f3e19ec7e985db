"""The command line in the process of the tests: what a process of its own gives, without the seconds of its imports."""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess
from unittest.mock import patch

from fusiontree.cli import main


def fusiontree(*arguments, stdin="", **environment):
    """Run a command; returns its exit code and what it wrote, as `subprocess.run` does."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    words = ["fusiontree", *map(str, arguments)]
    with (
        patch.object(sys, "argv", words),
        patch.object(sys, "stdin", given),
        patch.dict(os.environ, environment),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return CompletedProcess(words, code, *(file.buffer.getvalue().decode() for file in (out, err)))
