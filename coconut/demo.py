"""coconut demo: serve a page that answers questions and shows the effect of each thought."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.analysis.config import DemoConfig
from coconut.utils.console import log
from coconut.utils.hydra_app import application

if TYPE_CHECKING:
    from coconut.analysis.interactive import InteractiveModel
    from coconut.data.examples import Example


def run(config: DemoConfig) -> int:
    """Serve the page until Ctrl-C. Gives the exit status."""
    from coconut.engine.launcher_env import read_launcher_env
    from coconut.reporting.demo_server import DemoServer
    from coconut.utils.console import silence_libraries

    if read_launcher_env().rank:
        return 0  # under a launcher only the main process works
    silence_libraries()
    with DemoServer(config.host, config.port) as server:
        server.model = open_demo(config)
        with contextlib.suppress(KeyboardInterrupt):
            log(f"The page is at {server.address} (Ctrl-C ends it)")
            if not str(server.server_address[0]).startswith("127."):
                log("Anyone who can reach this machine can use the page. host=127.0.0.1 restricts it to this machine.")
            server.serve_forever()
        server.model.lock.acquire()  # wait for the answer in progress, and start no other
    return 0


def open_demo(config: DemoConfig) -> InteractiveModel:
    """Load the run's model, and the questions of its test file, or of its validation file if it has none."""
    from coconut.analysis.interactive import InteractiveModel
    from coconut.analysis.probes import Subject
    from coconut.methods import Curriculum, plan
    from coconut.runs.loading import load_run
    from coconut.tasks import TASKS

    trained = load_run(config.run, config.checkpoint, config.engine)
    file, examples = _rows(trained.config["data"])
    planned = plan(trained.config["method"], Curriculum.from_dict(trained.config["curriculum"]))
    task = TASKS[trained.config["data"]["task"]]
    subject = Subject(trained.lm, task, examples, trained_with_fewer_thoughts=planned.trained_with_fewer_thoughts)
    reasoning = trained.lm.reasoning
    about = {
        "run": Path(config.run).resolve().name, "method": reasoning.method, "stage": reasoning.stage,
        "step": trained.step, "slot": reasoning.slot.noun, "trained_thoughts": subject.num_trained_thoughts,
        "task": task.name, "file": file, "rows": len(examples),
        "trained_with_fewer_thoughts": planned.trained_with_fewer_thoughts, "warning": subject.warning,
    }  # fmt: skip
    return InteractiveModel(subject, about, config.engine.precision, config.max_new_tokens)


def _rows(data: Mapping[str, Any]) -> tuple[str, Sequence[Example]]:
    """The name and the rows of the file from which the page draws questions; no rows if the file is missing."""
    from coconut.data.datasets import data_files
    from coconut.data.examples import read_examples

    files = data_files(data)
    path = Path(files["test"] or files["valid"])
    if not path.is_file():
        log(f"No question can be drawn, because the run's data file is missing: {path}")
        return "", ()
    return path.name, read_examples(path)


main = application("demo", DemoConfig, run)

if __name__ == "__main__":
    main()
