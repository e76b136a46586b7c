"""The process of `coconut.tasks.expressions`: reads requests from stdin as lines of JSON, writes a reply for each.

A request that needs more than SECONDS of processor time, or more than MEMORY, ends the process.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

SECONDS = 3.0
MEMORY = 4 * 2**30  # bytes of address space


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print there
    logging.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process, whatever it is doing
        read = [parse(text, parsing_timeout=None) for text in json.loads(line)]  # pyright: ignore
        if len(read) == 2:
            reply = bool(read[0] and read[1]) and verify(read[1], read[0], timeout_seconds=None)
        else:
            reply = canonical(read[0][0]) if read[0] and not isinstance(read[0][0], str) else None
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


def canonical(expression: Any) -> str | None:
    """A spelling that equal expressions share: 1/2 and 0.5, x + 1 and 1 + x. None if it cannot be simplified."""
    import sympy

    try:
        if isinstance(expression, sympy.Eq) and isinstance(expression.lhs, sympy.Symbol):
            expression = expression.rhs  # x = 5
        if isinstance(expression, sympy.FiniteSet | sympy.Tuple):
            parts = [canonical(part) or str(part) for part in expression.args]
            is_set = isinstance(expression, sympy.FiniteSet)
            return "{" + ", ".join(sorted(parts)) + "}" if is_set else "(" + ", ".join(parts) + ")"
        exact = sympy.nsimplify(expression.doit(), rational=True)
        return str(sympy.simplify(exact))
    except Exception:  # sympy raises many types
        return None


if __name__ == "__main__":
    main()
