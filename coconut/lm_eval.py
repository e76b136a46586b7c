"""coconut lm_eval: the command of lm-evaluation-harness, which then knows the model `coconut`.

Releases of the harness that look for entry points of the group `lm_eval.models` find it by themselves; 0.4.13 does not.
"""

from __future__ import annotations

import os
import sys

from coconut.utils.hydra_app import exits_cleanly


@exits_cleanly
def main() -> None:
    """Run the harness's command with this process's arguments. ValueError and OSError are messages for the user."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(
            f"error: lm-evaluation-harness cannot be imported ({error}). Install it: "
            "pip install 'coconut-latent[lm-eval]'"
        )
    import coconut.hub.harness  # noqa: F401  registers the model

    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        if os.environ.get("COCONUT_TRACEBACK") or isinstance(error, BrokenPipeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
