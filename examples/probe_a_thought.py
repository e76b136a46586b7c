"""Look at the thoughts of a trained model, then put another question's in their place.

    python examples/probe_a_thought.py [RUN] [--question TEXT] [--other TEXT]

RUN is by default runs/quickstart, which `bash launch/quickstart.sh` makes. The two questions are by default about one
graph, with the same two options; only where one starts from differs, and with it the answer. probe_a_thought.ipynb is
the same, cell by cell.

Shapes: K thoughts, D hidden.
"""

import argparse

from coconut import answer, logit_lens
from coconut.config import EngineConfig
from coconut.runs.loading import load_model
from coconut.utils.console import silence_libraries

GRAPH = "4 3 | 6 4 | 2 8 | 3 8 | 2 3 | 7 0 | 9 7 | 1 5 | 2 4 | 5 7"


def probe(run: str, question: str, other: str) -> None:
    lm = load_model(run, "best", EngineConfig())
    asked = answer(lm, [question, other])
    own_KD, others_KD = asked.thoughts
    for text, said, thoughts_KD in zip((question, other), asked.texts, asked.thoughts, strict=True):
        print(f"{text}\n  answer: {said.strip()}")
        for number, tokens in enumerate(logit_lens(lm, thoughts_KD), 1):
            close = ", ".join(f"{token.strip()} {probability:.2f}" for token, probability in tokens)
            print(f"  thought {number} is close to: {close}")

    K = len(own_KD)
    changed = own_KD.repeat(K + 2, 1, 1)  # row 0 stays as it is
    for k in range(K):
        changed[k + 1, k] = others_KD[k]
    changed[K + 1] = others_KD
    names = ["its own thoughts", *(f"the other's thought {k}" for k in range(1, K + 1)), "all the other's thoughts"]
    print(question)
    for name, said in zip(names, answer(lm, [question] * (K + 2), thoughts=changed).texts, strict=True):
        print(f"  with {name}: {said.strip()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Look at thoughts, and exchange them.")
    parser.add_argument("run", nargs="?", default="runs/quickstart", help="a run's folder (default: runs/quickstart)")
    parser.add_argument("--question", default=f"{GRAPH} ? 8 or 7 from 6")
    parser.add_argument("--other", default=f"{GRAPH} ? 8 or 7 from 1")
    arguments = parser.parse_args()
    silence_libraries()
    try:
        probe(arguments.run, arguments.question, arguments.other)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
