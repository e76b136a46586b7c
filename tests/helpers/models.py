"""Small real models, tokenizers and batches."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from coconut import LatentLM
from coconut.analysis.probes import Subject
from coconut.data.batching import IGNORED, Batch
from coconut.data.examples import Example
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import build_word_tokenizer
from coconut.methods import NOTHING, Reasoning
from coconut.tasks import TASKS

WORDS = [Example(" ".join(map(str, range(40))), ("a b",), "c")]


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 48, "max_position_embeddings": 96},
    "qwen3": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 96},
}  # fmt: skip


def build(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **reasoning: Any) -> LatentLM:
    """A small model with weights large enough that every path through it matters."""
    torch.manual_seed(seed)
    tokenizer = build_word_tokenizer(WORDS)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, pad_token_id=0, **ARCHITECTURES[family]
    )
    base = AutoModelForCausalLM.from_config(config)
    lm = LatentLM.from_base(base, tokenizer, init="random", reasoning=Reasoning(**reasoning))
    shift_weights(lm, 0.1).to(dtype).eval()
    return in_float64(lm) if dtype is torch.float64 else lm


def shift_weights(lm: LatentLM, scale: float) -> LatentLM:
    """Add noise of this standard deviation to all weights that are trained."""
    with torch.no_grad():
        for weight in lm.parameters():
            if weight.requires_grad:
                weight.add_(scale * torch.randn_like(weight))
    return lm


def in_float64(lm: LatentLM) -> LatentLM:
    """The RMS norms of transformers go through float32 whatever the model is in; here they keep float64."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        small = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        scale = 1 + self.weight if "Gemma" in type(self).__name__ else self.weight
        return scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + small))

    for module in lm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return lm


def gradients(lm: LatentLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def in_graph(loss: torch.Tensor, function: type[torch.autograd.Function]) -> int:
    """How often the function is in the graph of a loss."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [next_node for next_node, _ in node.next_functions]
    return sum(type(node).__name__ == f"{function.__name__}Backward" for node in seen)


def byte_level_tokenizer(start: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, trained on next to nothing; with or without a token at the start."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["Is Tom a cat? Every dog is a cat. How many?"], trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $0 </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest |a - b| / |b| over the parameters."""
    assert a.keys() == b.keys()
    largest = max(g.norm() for g in b.values())
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp(min=1e-8 * largest)) for k in b)


def step(lm: LatentLM, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and its gradients."""
    lm.zero_grad()
    loss = lm(**batch).loss
    loss.backward()
    return loss.detach(), gradients(lm)


def summed_step(lm: LatentLM, batch: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of a batch, and its gradients. `options`: those of forward."""
    lm.zero_grad(set_to_none=True)
    loss = lm(**batch, **options).loss_sum
    loss.backward()
    return loss.detach(), gradients(lm)


def same_step(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> bool:
    """Whether losses and gradients of two steps agree in float64."""
    return bool((one[0] - other[0]).abs() < 1e-9) and relative(one[1], other[1]) < 1e-8


def assert_same(
    ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-9
) -> None:
    """Loss and gradients of two steps agree."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
    assert relative(ours[1], theirs[1]) < tolerance


def mixed_batch(lm: LatentLM) -> dict[str, Any]:
    """Rows with no thought, several, in several places, at the end; padding left, right, both, and inside."""
    random = torch.Generator().manual_seed(1)
    L = lm.latent_id
    ids = torch.randint(3, 35, (8, 20), generator=random)
    mask = torch.ones_like(ids)
    ids[0, 5:8] = L
    ids[1, 7] = L
    ids[2, [3, 4, 10, 15]] = L
    mask[3, :6], ids[3, 9:11] = 0, L
    mask[4, 15:], ids[4, [2, 14]] = 0, L
    mask[5, :2] = mask[5, 18:] = 0
    mask[6, 8:10], ids[6, 10] = 0, L
    ids[7, 19] = L
    ids[3, 2] = L  # under the mask: only padding
    wanted = (torch.rand(ids.shape, generator=random) < 0.5) & (ids != L)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(wanted, ids, -100)}


def token_batch(ids: Tensor, mask: Tensor, labels: Tensor, passes: int = 1) -> Batch:
    """A micro-batch of one form, for next-token prediction alone."""
    none = ids.new_zeros(len(ids), 0)
    count = int((labels != IGNORED).sum())
    return Batch(ids, mask, labels, ids.new_zeros(len(ids)), ids.new_full((len(ids),), -1), none, none[..., None], none,
                 none, (count,), passes)  # fmt: skip


QUESTIONS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19, 20]]


def padded(rows: list[list[int]], right: bool = False) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [row + pad if right else pad + row for row, pad in zip(rows, pads, strict=True)]
    mask = [
        [1] * len(row) + [0] * len(pad) if right else [0] * len(pad) + [1] * len(row)
        for row, pad in zip(rows, pads, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def by_recomputation(lm: LatentLM, question: list[int], num_thoughts: int, limit: int) -> list[int]:
    """Greedy text of one question, everything run again for every token."""
    row = question + slot_with_markers(lm.reasoning, lm.special, num_thoughts).tolist()
    new: list[int] = []
    while len(new) < limit:
        logits = lm(torch.tensor([row + new]), return_logits=True, use_cache=False).logits[0, -1]
        logits[lm.special.added] = -torch.inf
        new.append(int(logits.argmax()))
        if new[-1] == lm.special.eos:
            return new[:-1]
    return new


def rows_of(out: Any) -> list[list[int]]:
    return [row[:n] for row, n in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)]


MODES = ["short", "think", "latent_2"]


def hybrid(family: str = "llama", dtype: torch.dtype = torch.float64) -> LatentLM:
    lm = build(family, dtype, slot=NOTHING, markers=False)
    lm.add_modes(MODES, init="random")
    table: Any = lm.base.get_input_embeddings()
    with torch.no_grad():
        for name in MODES:
            table.weight[lm.special.control[name]].normal_(std=0.3)
    return lm


EXAMPLES = [Example("1 2 3", ("a b",), "c"), Example("4 5 6 7 8", ("a b",), "c"), Example("9", ("a b",), "c")]


TASK = TASKS["prosqa"]


SENTENCES = [
    Example(
        "Tom is a wumpus. Every wumpus is a cat. Every cat is a dog. Every wumpus is a vumpus. Bob is a rat. "
        "Is Tom a rat or dog?",
        ("Tom is a wumpus.", "Every wumpus is a cat.", "Every cat is a dog."),
        "Tom is a dog.",
    ),
    Example("Bob is a cat. Every cat is a yak. Tom is a dog. Is Bob a yak or dog?", (), "Bob is a yak."),
]


def subject(lm: LatentLM, examples: list[Example], task: str = "prosqa", batch_size: int = 4) -> Subject:
    return Subject(lm, TASKS[task], examples, batch_size)


def in_sentences(batch_size: int = 4, thoughts_per_step: int = 1, start: bool = False) -> Subject:
    """A small GPT-2 whose tokenizer takes several tokens for a name."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer(start)
    sizes: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), **sizes)
    reasoning = Reasoning(num_thoughts=2 * thoughts_per_step, thoughts_per_step=thoughts_per_step, max_new_tokens=4)
    lm = LatentLM.from_base(AutoModelForCausalLM.from_config(config), tokenizer, "random", reasoning)
    return subject(shift_weights(lm, 0.1).double().eval(), SENTENCES, batch_size=batch_size)
