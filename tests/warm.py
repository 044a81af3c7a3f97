"""Runs pages of code, each in a fork of this one process, which has imported what all of them import.

python warm.py    # a line of JSON for each page: {"code", "name", "folder", "output"}; answers its exit status
"""

import contextlib
import json
import os
import sys
import traceback
from types import ModuleType
from typing import NoReturn


def main() -> None:
    sys.path[0] = ""  # the page's own folder, as for `python -c`
    import torch
    import transformer_lens  # noqa: F401

    import mechunlearn  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(code: str, name: str, folder: str, output: str) -> NoReturn:
    """In the fork: the page as the main program, with its output in a file."""
    os.chdir(folder)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 1
    try:
        sys.modules["__main__"] = page = ModuleType("__main__")
        exec(compile(code, name, "exec"), page.__dict__)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
