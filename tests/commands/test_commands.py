"""The commands: configurations, help, errors, and text that arrives unchanged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from helpers import ROOT
from helpers.processes import forked_command, python
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import coconut
from coconut.__main__ import BUILDERS, COMMANDS
from coconut.adaptive.config import AdaptiveConfig
from coconut.analysis.config import AnalyzeConfig, DemoConfig
from coconut.completions.config import RolloutConfig
from coconut.config import (
    BadRows,
    ColumnNames,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    RowRule,
    RunConfig,
    StepRule,
    TrainConfig,
)
from coconut.evaluation.config import EvaluateConfig
from coconut.generation.config import GenerateConfig
from coconut.hub.config import ExportConfig
from coconut.methods import METHODS, plan
from coconut.rewards.config import RewardModelConfig
from coconut.rl.config import RLConfig
from coconut.serving.config import ServeConfig
from coconut.utils.hydra_app import CONF_DIR, exits_cleanly, explain_error, to_dataclass
from coconut.utils.overrides import as_arguments, as_override
from data_builders.gsm8k import Gsm8kBuild
from data_builders.importing import ImportBuild

SCHEMAS = {"train": TrainConfig, "evaluate": EvaluateConfig, "generate": GenerateConfig, "analyze": AnalyzeConfig,
           "export": ExportConfig, "demo": DemoConfig, "serve": ServeConfig, "rl": RLConfig, "rollout": RolloutConfig,
           "reward": RewardModelConfig, "adaptive": AdaptiveConfig}  # fmt: skip
for name, schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def composed(command: str, *overrides: str) -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_dataclass(compose(command, list(overrides)), SCHEMAS[command])


def typed(command: str, *arguments: str) -> Any:
    """As on the command line."""
    return composed(command, *(as_override(argument, SCHEMAS[command]) for argument in arguments))


def group(name: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / name).glob("*.yaml"))


def experiments() -> dict[str, tuple[str, list[str]]]:
    """The command of each, as its first lines name it, and the keys that it is given there besides."""
    told = {
        name: (CONF_DIR / "experiment" / f"{name}.yaml").read_text().splitlines()[1] for name in group("experiment")
    }
    found = {name: re.match(r"# coconut (\w+) experiment=\w+ ?(.*)", line) for name, line in told.items()}
    return {name: (match[1], match[2].split()) for name, match in found.items() if match}


@pytest.mark.parametrize("experiment", group("experiment"))
def test_every_experiment_is_built(experiment: str) -> None:
    command, needed = experiments()[experiment]
    config = composed(command, f"experiment={experiment}", *needed)
    assert isinstance(config, RunConfig | AdaptiveConfig)
    assert config.name == experiment
    if isinstance(config, TrainConfig):
        assert plan(config.method, config.curriculum).stages


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("model", "data", "engine", "tracking") for name in group(kind)]
)
def test_every_choice_is_built(kind: str, name: str) -> None:
    files = ["data.train=a.json", "data.valid=b.json", "data.task=prosqa"]
    assert isinstance(composed("train", f"{kind}={name}", *files), TrainConfig)


@cache
def help_of(command: str) -> subprocess.CompletedProcess[str]:
    """`coconut COMMAND --help`, in an empty folder."""
    with TemporaryDirectory() as folder:
        done = python("-m", "coconut", *command.split(), "--help", cwd=Path(folder))
        assert not list(Path(folder).iterdir()), "help leaves nothing behind"
    return done


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "rl", "adaptive"])
def test_help_names_every_choice(command: str) -> None:
    words = set(re.split(r"[^\w]+", help_of(command).stdout))
    kinds = {"train": ["data", "engine", "launch", "tracking", "model"], "rl": ["data", "engine", "launch", "tracking"]}
    for kind in kinds.get(command, []):
        assert {kind, *group(kind)} <= words
    assert {name for name, (its, _) in experiments().items() if its == command} <= words
    assert command != "train" or set(METHODS) <= words


def test_the_papers_hyperparameters() -> None:
    for name in ("prosqa_gpt2", "prontoqa_gpt2", "gsm8k_gpt2"):
        config = composed("train", f"experiment={name}")
        assert isinstance(config, TrainConfig)
        assert config.model == ModelConfig(base="openai-community/gpt2")
        assert (config.batch_size, config.curriculum.total_length) == (128, 50)
        assert config.optimizer == OptimizerConfig(lr=1e-4, weight_decay=0.01, warmup_steps=0, max_grad_norm=0)
        assert config.engine == EngineConfig()
        stages = plan(config.method, config.curriculum).stages
        expected = [6, 3, 3, 3, 35] if name == "gsm8k_gpt2" else [5, 5, 5, 5, 5, 5, 20]
        assert [stage.length for stage in stages] == expected


@pytest.mark.parametrize("data", ["gsm8k", "prosqa"])
def test_smollm2_has_the_papers_schedule(data: str) -> None:
    ours, papers = (composed("train", f"experiment={data}_{model}") for model in ("smollm2", "gpt2"))
    assert isinstance(ours, TrainConfig)
    assert replace(ours, name=papers.name, model=papers.model, engine=papers.engine) == papers
    assert (ours.engine.precision, ours.engine.cuda_graphs) == (Precision.bfloat16, True)


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, *(f"data {name}" for name in BUILDERS)])
def test_help_reads_well_from_any_folder(command: str) -> None:
    done = help_of(command)
    assert done.returncode == 0, done.stderr
    assert f"  coconut {command} " in done.stdout
    assert "Powered by Hydra" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_the_command_lists_what_there_is() -> None:
    shown = python("-m", "coconut", "--help")
    assert shown.returncode == 0
    names = [line.split()[0] for line in shown.stdout.splitlines() if line.startswith("  ")]
    assert names == [*COMMANDS, "data", "lm_eval"]
    assert max(map(len, shown.stdout.splitlines())) <= 110
    bare = python("-m", "coconut")
    assert (bare.returncode, bare.stdout) == (2, shown.stdout)
    builders = python("-m", "coconut", "data")
    assert builders.returncode == 2
    assert [line.split()[0] for line in builders.stdout.splitlines() if line.startswith("  ")] == list(BUILDERS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "error: There is no command trian. Did you mean train? The commands are: train, evaluate"),
        (["data", "prosq"], "error: There is no builder prosq. Did you mean prosqa? The builders are: prosqa"),
        (["train", "quickstart"], "error: quickstart is not KEY=VALUE. Did you mean experiment=quickstart?"),
    ],
)
def test_the_command_suggests_what_was_meant(arguments: list[str], words: str) -> None:
    done = python("-m", "coconut", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(words)


def test_training_without_arguments_lists_the_experiments(tmp_path: Path) -> None:
    of_training = [name for name, (command, _) in experiments().items() if command == "train"]
    for command in (["coconut", "train"], ["coconut.train"]):
        done = python("-m", *command, cwd=tmp_path)
        assert done.returncode == 2
        assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == of_training
        assert "coconut train experiment=quickstart" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_command_runs_as_its_module_does(tmp_path: Path) -> None:
    keys = ["experiment=quickstart", "seed=3", "--cfg", "job"]
    done = python("-m", "coconut", "train", *keys, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == python("-m", "coconut.train", *keys, cwd=tmp_path).stdout
    rows = python("-m", "coconut", "data", "prosqa", "num_train=2", "num_valid=1", "num_test=1", cwd=tmp_path)
    assert rows.returncode == 0, rows.stderr
    assert "coconut data prosqa" in (tmp_path / "data" / "prosqa_card.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["methd=cot"], "There is no key methd. Did you mean method?"),
        (["optimizer.learning_rate=1"], "There is no key optimizer.learning_rate"),
        (["max_stage=2"], "There is no key max_stage. Did you mean curriculum.max_stage?"),
        (["+engine.presicion=1"], "There is no key engine.presicion. Did you mean engine.precision?"),
        (["+lerning_rate=1"], "There is no key lerning_rate"),
        (["model.architecture.rope=1"], "model.architecture has no key rope. To add it: +model.architecture.rope="),
        (["seed"], "seed cannot be read as KEY=VALUE"),
        (["seed=many"], "seed=many: Value 'many' of type 'str' could not be converted to Integer"),
        (["optimizer=2"], "optimizer=2: optimizer has keys of its own, and each gets its value: optimizer.lr, opt"),
        (["seed=-1"], "seed is -1; it must be at least 0"),
        (["engine.precision=float8"], "engine.precision=float8: Invalid value 'float8', expected one of [float32, bf"),
        (["experiment=quickstar"], "There is no experiment=quickstar. Did you mean quickstart? The choices are: adap"),
        (["run=${nope}"], "run: Interpolation key 'nope' not found"),
        (["curriculum.thoughts_per_step=-1"], "curriculum.thoughts_per_step is -1"),
        (["curriculum.total_length=3"], "curriculum.total_length is 3"),
        (["method=cocnut"], "There is no method 'cocnut'"),
        (["optimizer.lr=0"], "optimizer.lr is 0"),
        (["optimizer.beta2=1"], "optimizer.beta2 is 1"),
        (["method=colar", "model.thought_scale=0"], "model.thought_scale is 0.0; it must be above 0"),
        (["data=own"], "data.train names no file"),
        (["data=own", "data.train=a.json", "data.valid=b.json"], "data.task is missing"),
        (["data=own", "+data.build.seed=1"], "needs a task. Set data.task to one of gsm8k"),
        (["data=own", "data.task=letters", "+data.build.seed=1"], "data.task=letters only judges. Name files"),
        (["data.train=a.json"], "data.valid names no file"),
    ],
)
def test_unknown_keys_and_wrong_values_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as raised:
        composed("train", "experiment=quickstart", *overrides)
    assert words in explain_error(raised.value, TrainConfig)


@pytest.mark.slow
def test_an_error_is_one_message(tmp_path: Path) -> None:
    for overrides, words in [
        (["curriculum.total_length=3"], "error: The stages of coconut before the last one"),
        (["data.train=away.json", "data.valid=away.json"], "away.json does not exist"),
        (["method=cot,icot", "methd=cot", "--multirun"], "error: There is no key methd"),
        (["model=5"], "error: Config group override must be a string"),
    ]:
        with forked_command("train", "experiment=quickstart", *overrides, cwd=tmp_path) as done:
            assert done.wait(60) == 2
            assert words in done.printed
            assert "Traceback" not in done.printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@settings(max_examples=40)
@given(st.text(min_size=1))
@example("Tom's cat, (is) it {a} [b]?")
@example("costs $5, ${x} or \\${y}")
@example('a "quoted" one')
@example("ends in \\")
@example("a=b: #c")
@example("-")
@example("''")
def test_any_text_survives_hydra(text: str) -> None:
    if text.strip() and "\0" not in text:
        assert typed("generate", "run=r", f"question={text}").question == text


def test_quoting_leaves_other_arguments_unchanged() -> None:
    for argument in ("seed=1", "run='a b'", "--help", "run", "+x.question=1", "init=null", "data=own",
                     "engine.kind=local", "~tracking.name=a", "hydra.sweep.dir=1.10", "+data.build.x=6"):  # fmt: skip
        assert as_override(argument, TrainConfig) == argument


NAMES = [
    "/home/é/data", "it's (a, b)", "a b", "back\\ slash", "#1", "a&b", "12e5", "1.10", "true", "0x1", "1_0", "nan",
    "+1", "runs/lr=0.1", "a,b", "[x", "[x]", "{y: 1}", "a: b", " a ", "x\\", "a'b'", "'a", "", "$a", "~a", "日本",
]  # fmt: skip


@pytest.mark.parametrize("key", ["run", "name", "data.prefix", "++model.tokenizer", "tracking.tags"])
def test_any_name_survives(key: str) -> None:
    for name in NAMES:
        in_quotes = '"' + (name + "\\" if name.endswith("\\") else name) + '"'
        value = f"[b,{in_quotes}]" if key == "tracking.tags" else name
        assert taken(f"{key}={value}") == [["b", name] if key == "tracking.tags" else name]
        if key != "tracking.tags":  # of a sweep, which Hydra writes once more
            value = in_quotes if "," in name else name.strip()
            jobs = jobs_of(f"{key}=x,{value}", "seed=0")
            assert [taken(job[0], typed=False) for job in jobs] == [["x"], [name if "," in name else name.strip()]]


def taken(*arguments: str, typed: bool = True) -> list[Any]:
    """What Hydra and OmegaConf make of the values."""
    written = [as_override(argument, TrainConfig) if typed else argument for argument in arguments]
    found = [override.value() for override in OverridesParser.create().parse_overrides(written)]
    return list(OmegaConf.to_container(OmegaConf.create(found), resolve=True))  # pyright: ignore


def jobs_of(*arguments: str) -> list[list[str]]:
    """What Hydra makes of a sweep."""
    written = [as_override(argument, TrainConfig, multirun=True) for argument in arguments]
    return BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(written), None)[0]


@pytest.mark.parametrize(
    ("argument", "runs"),
    [
        ("run=a,b", ["a", "b"]),
        ("run=1.10,true", ["1.10", "true"]),
        ("run='a,b',c", ["a,b", "c"]),
        ("run=it's, b=c", ["it's", "b=c"]),
        ("run=choice(a,b)", ["a", "b"]),
    ],
)
def test_a_sweep_over_names(argument: str, runs: list[str]) -> None:
    assert [taken(*job, typed=False) for job in jobs_of(argument)] == [[run] for run in runs]


@pytest.mark.parametrize("argument", ["curriculum.modes=[short,think],[think,short]", "curriculum.modes=[a, 'b]'],[c]"])
def test_a_sweep_over_lists(argument: str) -> None:
    assert [len(job) for job in jobs_of(argument)] == [1, 1]


def test_home_folders_null_and_references_in_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    config = typed(
        "train", "run=~/r", "init=~", 'model.base="~/m"', "seed=3", "name='a b'", "data=own", "data.task=prosqa",
        "data.train=t-${seed}", r"data.valid=\${v}", "model.tokenizer=null", "tracking.tags=a b,c", "tracking.name=~",
    )  # fmt: skip
    assert (config.run, config.init, config.model.base) == ("/home/anna/r", "/home/anna", "/home/anna/m")
    assert (config.name, config.data.train, config.data.valid) == ("a b", "t-3", "${v}")
    assert (config.model.tokenizer, config.tracking.tags, config.tracking.name) == (None, ["a b", "c"], "~")
    assert typed("evaluate", "run=null").run == "null"
    assert typed("evaluate", "run=r", "output=~/x").output == "/home/anna/x"


@pytest.mark.parametrize(
    ("written", "step"),
    [
        (r"{}\n", "{}\n"),
        (r'"{}\n"', "{}\n"),
        (r"'it\'s {}\t'", "it's {}\t"),
        (r"{}\\n", r"{}\n"),
        (r"{} \neq", "{} \neq"),
        ("{}\n", "{}\n"),
        ("{}, ${x} # = [", "{}, ${x} # = ["),
        (r"{}\rightarrow", r"{}\rightarrow"),
    ],
)
def test_a_format_template_on_the_command_line(written: str, step: str) -> None:
    assert taken(f"data.format.step={written}") == [step]


@pytest.mark.slow
@settings(max_examples=60)
@given(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)] * 3)
@example('"a"', "'\\n'", "Null")
@example("a\\nb\t\n\\", "${x}", "'")
def test_arguments_give_their_configuration_again(first: str, second: str, third: str) -> None:
    rule = RowRule(
        columns=ColumnNames(first, third), keep=[third, first], bad_rows=BadRows.skip,
        steps=StepRule(separator=second, mark=None if third.lower() == "null" else third),
    )  # fmt: skip
    config = ImportBuild(**vars(rule), source=third, num_valid=3)
    ConfigStore.instance().store(name="build_import_schema", node=ImportBuild)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        again = to_dataclass(
            compose("build_import", [as_override(a, ImportBuild) for a in as_arguments(config)]), ImportBuild
        )
    assert again == replace(config, source=os.path.expanduser(third))


def test_builders_take_names_to_the_letter() -> None:
    ConfigStore.instance().store(name="build_gsm8k_schema", node=Gsm8kBuild)
    arguments = ["out_dir=1.10=a b", "name=12e5", "hub=1e5", "hub_config=true"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = to_dataclass(compose("build_gsm8k", [as_override(each, Gsm8kBuild) for each in arguments]), Gsm8kBuild)
    assert (config.out_dir, config.name, config.hub, config.hub_config) == ("1.10=a b", "12e5", "1e5", "true")


def test_arguments_that_are_not_utf8_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = os.fsdecode(b"r\xe9")
    (tmp_path / odd).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / odd)
    monkeypatch.chdir(tmp_path)
    for argument in (f"run={odd}", "run=link/x", f"init={odd}/x", f"tracking.name={odd}", f"tracking.tags=[a,{odd}]"):
        with pytest.raises(ValueError, match=rf"^{argument.partition('=')[0]} is .*, which is not UTF-8") as raised:
            typed("train", "experiment=quickstart", argument)
        str(raised.value).encode()
    question = "question=" + os.fsdecode(b"1 \xe9")
    with pytest.raises(ValueError, match=r"^question is not UTF-8 text .*line 1 holds 0xE9, byte 3"):
        typed("generate", "run=r", question)
    monkeypatch.chdir(odd)
    with pytest.raises(ValueError, match=r"^The current folder is .*, which is not UTF-8"):
        typed("analyze", "run=r")


def test_default_folders_say_method_and_seed() -> None:
    for command, keys, named in [
        ("train", ["experiment=quickstart", "seed=3"], "quickstart-coconut-seed3"),
        ("rl", ["experiment=thinkless_laptop", "init=r", "objective.name=grpo"], "thinkless_laptop-grpo-seed0"),
        ("reward", ["init=r", "data.train=a", "data.valid=b", "loss=dpo"], "custom-dpo-seed0"),
    ]:
        assert re.fullmatch(f"runs/{named}-[0-9a-f]{{8}}", str(composed(command, *keys).folder()))


def test_a_missing_launcher_says_what_to_install() -> None:
    error = MissingConfigException("", "hydra/launcher/submitit_slurm", ["basic"])
    assert "pip install hydra-submitit-launcher" in explain_error(error, TrainConfig)


def test_closed_output_and_interrupts_end_a_command_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "data_builders.pointers", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")

    @exits_cleanly
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        interrupted()
    assert left.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_importing_coconut_keeps_the_interrupt_handler_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import coconut\n")
    asked = "import signal\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    (tmp_path / "mine" / "__main__.py").write_text(asked)
    done = python("-m", "mine", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_leaves_an_interrupt_without_a_traceback(tmp_path: Path) -> None:
    asked = "import coconut, signal\nassert signal.getsignal(signal.SIGINT) is signal.SIG_DFL\n"
    (tmp_path / "coconut").write_text(asked)
    done = python(str(tmp_path / "coconut"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    for name, more in [("evaluate", []), ("generate", ["question=a"]), ("analyze", [])]:
        with forked_command(name, f"run={tmp_path}", *more) as done:
            assert done.wait(60) == 2
            assert "is not a run: it has no config.json" in done.printed
        with pytest.raises(ValueError, match="Name the run: run=DIR"):
            composed(name, *more)


def test_another_package_of_the_same_name_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "coconut", tmp_path / "coconut")
    (tmp_path / "coconut" / "__init__.py").write_text("# the programming language's\n")
    done = python("-m", "coconut.train", "--help", cwd=tmp_path)
    assert done.returncode == 1
    assert "another package named coconut" in done.stderr
    assert "pip uninstall coconut" in done.stderr


@pytest.mark.slow
def test_import_is_light() -> None:
    done = python(
        "-c", "import coconut, sys; coconut.METHODS; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]"
    exec("from coconut import *; LatentLM, METHODS, answer, logit_lens, plan", {})
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = coconut.Nothing
