"""What tests share: where things are, small models and data, processes, runs. Import it before torch."""

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import coconut

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
DATA = TESTS / "data"
SHARED = ROOT.parent / "shared" / "data"  # real data sets, where they are at hand

if Path(coconut.__file__).parent.parent.resolve() != ROOT.resolve():
    raise ImportError(
        f"The tests of {ROOT} would run another package named coconut: {coconut.__file__}. Put {ROOT} on PYTHONPATH, "
        "or run launch/test.sh there."
    )

import torch  # noqa: E402  after what its libraries read from the environment

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, and in all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
