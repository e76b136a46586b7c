"""Convert GSM8K-Aug-NL: GSM8K-Aug with chains in sentences, as used by CODI (arXiv 2502.21074). Training rows only.

Run `coconut data gsm8k_aug_nl --help`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from coconut.utils.hydra_app import application
from data_builders import gsm8k
from data_builders.builder_app import run

HUB = "zen-E/GSM8k-Aug-NL"


@dataclass
class Gsm8kAugNlBuild(gsm8k.Gsm8kBuild):
    """As `Gsm8kBuild`, with sentences as steps, from the hub unless files are given."""

    name: str = "gsm8k_aug_nl"
    steps: gsm8k.Steps = gsm8k.Steps.sentences

    def __post_init__(self) -> None:
        if not (self.files or self.preset or self.hub):
            self.hub = HUB
        super().__post_init__()


BUILDER = replace(
    gsm8k.BUILDER,
    command="gsm8k_aug_nl",
    title="grade-school arithmetic, chains in sentences",
    about=(
        "GSM8K-Aug (Deng et al., arXiv 2311.01460) with chains in words, as released with CODI (arXiv 2502.21074). It "
        "has training rows only; the test is that of GSM8K. Steps are split at the ends of sentences."
    ),
)

build = partial(run, builder=BUILDER)
main = application("build_gsm8k_aug_nl", Gsm8kAugNlBuild, build)

if __name__ == "__main__":
    main()
