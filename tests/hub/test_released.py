"""Checkpoints of the released code of CODI and SIM-CoT, against wrappers with its names that are run by hand.

The names come from torch and peft, and what is compared with is computed with peft's own layers, one question at a
time. Shapes: T tokens, D hidden, V embeddings of the wrapper.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.models import ARCHITECTURES, byte_level_tokenizer, in_float64
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.export import run as run_export
from coconut.generate import run as run_generate
from coconut.generation.config import GenerateConfig
from coconut.generation.generate import answer
from coconut.hub.config import ExportConfig
from coconut.hub.released_checkpoints import from_released
from coconut.hub.releases import released_reasoning
from coconut.methods import PromptFormat

pytestmark = [  # what peft and, with the argument's older name, this file call in transformers
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
QUESTIONS = ["How many?", "Is Tom a cat? Every dog is a cat."]
EOS, THOUGHTS, RANK, ALPHA, NEW_TOKENS = 1, 3, 4, 6, 5
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"]}


def small_model(base: Path, more: int = 0) -> Any:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    if more:
        model.resize_token_embeddings(len(byte_level_tokenizer()) + more, mean_resizing=False)
    return model


def save_base(folder: Path, family: str) -> Path:
    """The config and the tokenizer of a base model; Llama's begins each text with a token."""
    tokenizer = byte_level_tokenizer(start=family == "llama")
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=EOS, **ARCHITECTURES[family]
    )
    config.save_pretrained(folder)
    return folder


class Codi(nn.Module):
    """The attributes of the released wrapper, and its inference of one question."""

    def __init__(self, base: Path, family: str, lora: bool, decoder: bool = False):
        super().__init__()
        self.codi: Any = small_model(base, more=3)
        if lora:
            config = peft.LoraConfig(
                task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.1, target_modules=TARGETS[family],
                fan_in_fan_out=family == "gpt2",
            )  # fmt: skip
            self.codi = peft.get_peft_model(self.codi, config)
        if decoder:
            self.decoder, self.pj_in = small_model(base), nn.Linear(32, 32)
        self.prj = nn.Sequential(nn.Dropout(0.0), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 32))
        self.prj.add_module("ln", nn.LayerNorm(32))
        for weight in self.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        in_float64(self.double().eval())  # pyright: ignore[reportArgumentType]
        self.bot = len(byte_level_tokenizer()) + 1

    @torch.no_grad()
    def answered(self, ids: list[int]) -> tuple[list[int], Tensor]:
        """Greedy tokens, and the logits (T, V) that chose them."""
        out = self.codi(input_ids=torch.tensor([[*ids, self.bot]]), use_cache=True, output_hidden_states=True)
        for _ in range(THOUGHTS):
            thought = self.prj(out.hidden_states[-1][:, -1:])
            out = self.codi(inputs_embeds=thought, past_key_values=out.past_key_values, output_hidden_states=True)
        new, logits, fed = [], [], self.bot + 1
        while len(new) < NEW_TOKENS and EOS not in new:
            out = self.codi(input_ids=torch.tensor([[fed]]), past_key_values=out.past_key_values)
            logits.append(out.logits[0, -1].clone())
            out.logits[0, -1, [self.bot, self.bot + 1]] = -torch.inf  # which are never written here
            new.append(fed := int(out.logits[0, -1].argmax()))
        return new, torch.stack(logits)


def write(state: dict[str, Tensor], file: Path) -> Path:
    if file.suffix == ".safetensors":  # which keeps one name of weights that are shared
        kept = {weight.data_ptr(): name for name, weight in reversed(state.items())}
        save_file({name: state[name].contiguous() for name in kept.values()}, file)
    else:
        torch.save(state, file)
    return file


def assert_answers_alike(lm: LatentLM, wrapper: Any, start: list[int], end: str = "") -> None:
    in_float64(lm)
    special, K = lm.special, lm.reasoning.num_thoughts
    rows = answer(lm, QUESTIONS, max_new_tokens=NEW_TOKENS).tokens.tolist()
    for question, row in zip(QUESTIONS, rows, strict=True):
        ids = [*start, *byte_level_tokenizer()(question + end, add_special_tokens=False)["input_ids"]]  # pyright: ignore
        new, logits_TV = wrapper.answered(ids)
        assert row[: len(new)] == new
        whole = torch.tensor([[*ids, special.bot, *[special.latent] * K, special.eot, *new[:-1]]])
        ours = lm(whole, return_logits=True).logits[0, -len(new) :, : logits_TV.shape[1]]
        torch.testing.assert_close(ours, logits_TV, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "lora", "method", "name"),
    [("gpt2", True, "codi", "pytorch_model.bin"), ("gpt2", False, "codi", "model.safetensors"),
     ("llama", False, "codi", "pytorch_model.bin"),
     ("llama", True, "sim_cot_codi", "model-00001-of-00001.safetensors")],
)  # fmt: skip
def test_codi_is_asked_as_by_the_released_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, lora: bool, method: str, name: str
) -> None:
    torch.manual_seed(0)
    base = save_base(tmp_path / "base", family)
    wrapper = Codi(base, family, lora, decoder=method == "sim_cot_codi")
    (tmp_path / "released").mkdir()
    write(wrapper.state_dict(), tmp_path / "released" / name)
    reasoning = released_reasoning(method, num_thoughts=THOUGHTS)
    lm = from_released(tmp_path / "released", str(base), reasoning, lora_alpha=ALPHA if lora else None)
    assert ("the step decoder is left out" in capsys.readouterr().out) == (method == "sim_cot_codi")
    assert (lm.reasoning.slot.width, lm.special.pad, lm.special.bot) == (24, wrapper.bot - 1, wrapper.bot)
    assert_answers_alike(lm, wrapper, [0] if family == "llama" else [])
    if lora:
        merged = wrapper.codi.merge_and_unload().state_dict()
        for name, weight in lm.base.state_dict().items():
            torch.testing.assert_close(weight[: len(merged[name])], merged[name], rtol=0, atol=1e-12)


class SimCot(nn.Module):
    """SIM-CoT's wrapper of Coconut, and its inference of one question: everything is run again for each token."""

    def __init__(self, base: Path):
        super().__init__()
        self.base_causallm, self.expainable_llm = small_model(base, more=3), small_model(base)
        for weight in self.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        self.embedding = self.base_causallm.get_input_embeddings()
        in_float64(self.double().eval())  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def answered(self, ids: list[int]) -> tuple[list[int], Tensor]:
        first = len(byte_level_tokenizer())
        row = self.embedding(torch.tensor([[*ids, first]]))
        for _ in range(4):
            states = self.base_causallm(inputs_embeds=row, output_hidden_states=True).hidden_states[-1]
            row = torch.cat([row, states[:, -1:]], dim=1)
        new, logits, fed = [], [], first + 1
        while len(new) < NEW_TOKENS and EOS not in new:
            row = torch.cat([row, self.embedding(torch.tensor([[fed]]))], dim=1)
            logits.append(self.base_causallm(inputs_embeds=row).logits[0, -1])
            new.append(fed := int(logits[-1][:first].argmax()))
        return new, torch.stack(logits)


def test_sim_cot_on_coconut_is_asked_as_by_the_released_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    torch.manual_seed(0)
    base = save_base(tmp_path / "base", "gpt2")
    wrapper = SimCot(base)
    write(wrapper.state_dict(), tmp_path / "checkpoint_28")
    reasoning = released_reasoning("sim_cot", stage=2, thoughts_per_step=2)
    lm = from_released(tmp_path / "checkpoint_28", str(base), reasoning)
    assert "the step decoder is left out" in capsys.readouterr().out
    assert_answers_alike(lm, wrapper, [], end="\n")
    with pytest.raises(ValueError, match=r"SIM-CoT on Coconut .* does not train coconut\. Set method=sim_cot"):
        from_released(tmp_path / "checkpoint_28", str(base), released_reasoning("coconut", stage=2))


def test_exported_release_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    base = save_base(tmp_path / "base", "gpt2")
    wrapper = Codi(base, "gpt2", lora=True)
    stored = {name: weight.bfloat16() for name, weight in wrapper.state_dict().items()}
    file, output = write(stored, tmp_path / "file.bin"), tmp_path / "model"
    run_export(ExportConfig(released=str(file), base=str(base), method="codi", num_thoughts=THOUGHTS, lora_alpha=ALPHA,
                            question="{}\n", output=str(output)))  # fmt: skip
    lm = LatentLM.from_pretrained(output)
    assert lm.reasoning.format == PromptFormat(question="{}\n", answer="The answer is: {}")
    assert lm.base.dtype == lm.feedback.projector[0].weight.dtype == torch.float32
    untouched = stored["codi.base_model.model.transformer.ln_f.weight"]
    assert torch.equal(lm.base.state_dict()["transformer.ln_f.weight"], untouched.float())
    capsys.readouterr()
    run_generate(GenerateConfig(run=str(output), question=QUESTIONS[0], max_new_tokens=NEW_TOKENS))
    assert capsys.readouterr().out.strip() == answer(lm, QUESTIONS[:1], max_new_tokens=NEW_TOKENS).texts[0].strip()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(0)
    base = save_base(tmp_path_factory.mktemp("base"), "gpt2")
    return base, Codi(base, "gpt2", lora=True).state_dict()


GPT2 = "codi.base_model.model.transformer."
ATTENTION = f"{GPT2}h.0.attn.c_attn."


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prj.3.bias": None}, r"1 is missing \(prj\.3\.bias\)"),
     ({"prj.ln.weight": None, "prj.ln.bias": None}, r"2 are missing \(prj\.ln\.weight, prj\.ln\.bias\)"),
     ({f"{GPT2}ln_f.bias": None}, r"1 is missing \(codi\.base_model\.model\.transformer\.ln_f\.bias\)"),
     ({f"{ATTENTION}lora_B.default.weight": None}, r"LoRA .* 1 is missing \(codi.*c_attn\.lora_B\.default\.weight\)"),
     ({f"{ATTENTION}base_layer.weight": None, f"{ATTENTION}base_layer.bias": None}, r"missing \(.*base_layer\.weight"),
     ({f"{GPT2}h.9.ln_1.weight": torch.ones(32)}, r"1 is too many \(codi.*h\.9\.ln_1\.weight\)"),
     ({"halt_head.weight": torch.ones(32)}, r"1 is too many \(halt_head\.weight\)"),
     ({f"{ATTENTION}lora_A.other.weight": torch.ones(4, 32)}, r"1 is too many \(.*lora_A\.other"),
     ({"prj.1.weight": torch.ones(24, 31)}, r"prj\.1\.weight is \(24, 31\) there and \(24, 32\) here"),
     ({f"{ATTENTION}lora_A.default.weight": torch.ones(4, 31)}, r"A \(4, 31\) and B .* do not fit .* \(32, 96\)"),
     ({f"{ATTENTION}lora_A.default.weight": torch.ones(5, 32)}, r"have the ranks \[4, 5\]"),
     ({f"{GPT2}wte.weight": torch.ones(40, 32)}, "has 40 embeddings; .* the released code adds 3"),
     ({"decoder.lm_head.weight": torch.ones(2)}, "SIM-CoT on CODI .* does not train codi. Set method=sim_cot_codi"),
     ({f"{GPT2}wte.weight": None, "codi.base_model.model.lm_head.weight": None}, "are not those of a gpt2")],
)  # fmt: skip
def test_damaged_files_are_refused(
    whole: tuple[Path, dict[str, Tensor]], tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    base, state = whole
    changed = {name: weight for name, weight in {**state, **changes}.items() if weight is not None}
    file = write(changed, tmp_path / "file.bin")
    with pytest.raises(ValueError, match=message):
        from_released(file, str(base), released_reasoning("codi", num_thoughts=THOUGHTS), lora_alpha=ALPHA)


def test_untied_values_of_a_tied_model_are_refused(whole: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    base, state = whole
    head = "codi.base_model.model.lm_head.weight"
    file = write({**state, head: state[head] + 1}, tmp_path / "file.bin")
    with pytest.raises(ValueError, match=r"wte\.weight and codi\.base_model\.model\.lm_head\.weight differ"):
        from_released(file, str(base), released_reasoning("codi", num_thoughts=THOUGHTS), lora_alpha=ALPHA)


@pytest.mark.parametrize(
    ("alpha", "settings", "message"),
    [(None, None, "LoRA weights of rank 4, and not how much they count. Set lora_alpha=A"),
     (-1, None, "lora_alpha is -1; it must be a number above 0"),
     (8, {"lora_alpha": 6}, "lora_alpha=8, and .* has 6"),
     (None, {"lora_alpha": 6, "r": 5}, "has the rank 5, and the weights in .* have the rank 4"),
     (None, {"lora_alpha": 6, "use_dora": True}, "has use_dora")],
)  # fmt: skip
def test_unknown_scale_is_refused(
    whole: tuple[Path, dict[str, Tensor]], tmp_path: Path, alpha: float | None, settings: Any, message: str
) -> None:
    base, state = whole
    if settings:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        from_released(write(state, tmp_path / "file.bin"), str(base), released_reasoning("codi", num_thoughts=THOUGHTS),
                      lora_alpha=alpha)  # fmt: skip


def test_recorded_scale_is_taken(whole: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    base, state = whole
    file, reasoning = write(state, tmp_path / "file.bin"), released_reasoning("codi", num_thoughts=THOUGHTS)
    given = from_released(file, str(base), reasoning, lora_alpha=2 * ALPHA).base.state_dict()
    settings = {"lora_alpha": ALPHA, "r": RANK, "use_rslora": True}  # alpha / sqrt(4) in place of alpha / 4
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    recorded = from_released(file, str(base), reasoning).base.state_dict()
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(recorded[name], given[name], rtol=0, atol=1e-12)


def test_files_that_hold_no_such_weights_are_refused(whole: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    base, state = whole
    reasoning = released_reasoning("codi", num_thoughts=THOUGHTS)
    torch.save({"codi.x": torch.ones(1), "object": Path("x")}, tmp_path / "object.bin")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    for name in ("object.bin", "broken.safetensors"):
        with pytest.raises(ValueError, match="must contain tensors only"):
            from_released(tmp_path / name, str(base), reasoning)
    with pytest.raises(FileNotFoundError, match=r"has no model\*\.safetensors and no pytorch_model\*\.bin"):
        from_released(base, str(base), reasoning)
    plain = {name: weight for name, weight in state.items() if ".lora_" not in name}
    plain = {name.replace(".base_layer", ""): weight for name, weight in plain.items()}
    with pytest.raises(ValueError, match=r"lora_alpha=6, and .* has no LoRA weights"):
        from_released(write(plain, tmp_path / "plain.bin"), str(base), reasoning, lora_alpha=ALPHA)
    tokenizer = deepcopy(byte_level_tokenizer())
    tokenizer.add_tokens(["<bot>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    more = write({**plain, f"{GPT2}wte.weight": torch.ones(len(tokenizer) + 2, 32)}, tmp_path / "more.bin")
    with pytest.raises(ValueError, match="has <bot> already"):
        from_released(more, str(base), reasoning, str(tmp_path / "tokenizer"))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"method": "colar"}, "opened for coconut, .*codi, sim_cot_codi"),
     ({"method": "codi"}, "Say how many thoughts .* num_thoughts=K"),
     ({"method": "codi", "num_thoughts": 6, "stage": 2}, "stage=2: codi has no stages"),
     ({"method": "coconut", "num_thoughts": 6}, "num_thoughts=6: coconut has thoughts by its stage"),
     ({"method": "sim_cot"}, "in which stage the checkpoint was written")],
)  # fmt: skip
def test_what_a_checkpoint_does_not_say_has_to_be_given(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportConfig(released="a", base="b", output="c", **values)
