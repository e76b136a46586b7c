"""coconut serve: answer requests in OpenAI's protocol over HTTP with a trained model."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec

from coconut.serving.config import ServeConfig
from coconut.utils.console import log
from coconut.utils.hydra_app import application


def run(config: ServeConfig) -> int:
    """Serve the model until Ctrl-C. Gives the exit status."""
    from coconut.engine.launcher_env import read_launcher_env
    from coconut.runs.loading import load_model
    from coconut.utils.console import silence_libraries

    if read_launcher_env().rank:
        return 0  # under a launcher only the main process works
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise ValueError(f"coconut serve needs {' and '.join(missing)}. Install: pip install 'coconut-latent[serve]'")
    from coconut.serving.server import address, listening, make_server

    silence_libraries()
    with listening(config.host, config.port) as listener:
        server = make_server(load_model(config.run, config.checkpoint, config.engine), config)
        with contextlib.suppress(KeyboardInterrupt):
            log(f"The model is served at {address(config.host, listener)} (Ctrl-C ends it)")
            server.run(sockets=[listener])
    return 0


main = application("serve", ServeConfig, run)

if __name__ == "__main__":
    main()
