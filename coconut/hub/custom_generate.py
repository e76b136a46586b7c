"""Generation of a model that reasons in continuous latent space, for `custom_generate` of transformers.

This file stands beside a model's weights as `custom_generate/generate.py`. It imports PyTorch and transformers (and
safetensors, in which transformers keeps weights), and reads what it has to know from the model's folder: `coconut.json`
says how the model reasons, `feedback.safetensors` holds what maps its states to thoughts, and `gates.safetensors` the
gates of a model that has them. What happens to a prompt, which is a question in the model's prompt format:

    question <bot>         run through the model, into the KV cache
    thought ... thought    each made of the last hidden state before it, and fed as the next input
    <eot> answer           written by transformers' own generation, which continues from the cache

A model with pauses has `<pause>` tokens in the place of thoughts, and another may have nothing between question and
answer. A hybrid model first chooses what follows, by a control token.

Shapes: B rows, T columns, N new tokens, K thoughts, D the width of an embedding, E of what a thought is made of, V the
vocabulary, M the words of a mixture, S of a group.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.utils.hub import cached_file

Parts = tuple[list[int], int, list[int]]  # of a prompt: before the thoughts, their number, and after them
TESTED = "5.24"  # transformers
FORMAT_VERSION = 5  # coconut.json
COMMIT = re.search(r"([0-9a-f]{40})[/\\]custom_generate[/\\]", __file__)  # where transformers keeps files of the hub
REVISION = COMMIT[1] if COMMIT else None
KNOWN = {
    "source": ("nothing", "pause", "thought"),
    "content": ("state", "mixture", "fused"),
    "update": ("sequential", "jacobi", "loop", "teacher_forced"),
    "projector": ("none", "mlp_ln", "gaussian", "multi_token"),
}
IN_PACKAGE = "is an option of LatentLM.generate of the coconut package alone. Leave it out"
REFUSED = {  # arguments and settings with another value than this one, and why
    "inputs_embeds": (None, "cannot be given: thoughts follow token ids. Give input_ids"),
    "position_ids": (None, "cannot be given: thoughts have positions too. Leave it out"),
    "cache": (None, "cannot be given: thoughts fill the cache. Leave it out"),
    "past_key_values": (None, "cannot be given: thoughts fill the cache. Leave it out"),
    "assistant_model": (None, "would draft words without the thoughts. Leave it out"),
    "negative_prompt_ids": (None, "would be read without thoughts. Leave it out"),
    "guidance_scale": (1.0, "compares with words that are written without thoughts. Leave it out"),
    "synced_gpus": (False, "is not supported: processes would need equally many thoughts. Leave it out"),
    "max_length": (None, "would count the thoughts. Set max_new_tokens"),
    "min_length": (0, "would count the thoughts. Set min_new_tokens"),
    "token_healing": (False, "would change the tokens before the answer. Leave it out"),
    "use_cache": (True, "cannot be switched off: the cache holds the thoughts. Leave it out"),
    "cache_implementation": (None, "is not supported: thoughts need a DynamicCache. Leave it out"),
    "prefill_chunk_size": (None, "is not supported: a prompt runs in one pass. Leave it out"),
    **dict.fromkeys(("thoughts", "thought_noise", "thought_dropout", "stop", "soft_thinking"), (None, IN_PACKAGE)),
    **dict.fromkeys(("prefix_ids", "log_probs", "random_keys"), (None, IN_PACKAGE)),
}

if transformers.__version__.split(".")[:2] != TESTED.split("."):
    warnings.warn(
        f"The generation of this model was tested with transformers {TESTED}; {transformers.__version__} is installed.",
        stacklevel=2,
    )


@torch.no_grad()
def generate(
    inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *, model: Any,
    input_ids: Tensor | None = None, attention_mask: Tensor | None = None, num_thoughts: int | None = None,
    mode: str | list[str] | None = None, tokenizer: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """Answer prompts (B, T) of any lengths, padded on either side, each as it would be answered alone.

    Returns what transformers' generate returns: the prompts as they were given, with their padding, and after them the
    new tokens, (B * num_return_sequences, T + N). A thought is no token, so thoughts and their markers are not among
    them. A hybrid model's control token is the first of them, since the model chooses it. An output with
    `return_dict_in_generate=True` also has `num_thoughts` (B * num_return_sequences,), how many were fed.

    `num_thoughts`: in place of the number that the model was trained with, which is the most of them where it ends them
    itself. `mode`: of a hybrid model, for all answers or for each; by default it chooses. `tokenizer`: reads the words
    for `stop_strings`; by default that of the folder. All other options, such as sampling, processors and streamer, are
    transformers' own, with the defaults of the folder's generation_config.json. To them the markers, and the latent
    token in the place of each thought, are a part of the prompt.

    Raises ValueError for a prompt that is empty, holds markers or leaves no room in the model's context, for thoughts
    or a mode that the model does not have, and for what cannot be combined with thoughts: `REFUSED`, beams, and
    whatever else is neither greedy decoding nor sampling.
    """
    settings, others = _settings(model, generation_config, options)
    given = input_ids if inputs is None else inputs
    if given is None or given.dim() != 2:
        raise ValueError("There is no prompt. Give input_ids of the shape (prompts, tokens), as tokenizers make them.")
    latent = model.__dict__.get("_latent_reasoning")
    if latent is None or (latent.place, latent.device) != (model.name_or_path, model.device):
        latent = model.__dict__["_latent_reasoning"] = LatentReasoning(model)
    samples, settings.num_return_sequences = settings.num_return_sequences or 1, 1
    questions = latent.questions(given, attention_mask)
    given = given.repeat_interleave(samples, dim=0)
    if latent.reasoning.modes:  # each answer has its own
        questions, samples = [row for row in questions for _ in range(samples)], 1
    modes = latent.choose_modes(questions, mode, settings)
    prompts = [latent.prompt(row, name, num_thoughts) for row, name in zip(questions, modes, strict=True)]
    most = settings.max_new_tokens
    limits = latent.limits(prompts, latent.reasoning.max_new_tokens if most is None else most)
    if settings.return_dict_in_generate and len({*limits}) > 1:
        raise ValueError("These prompts come to the end of the model's context after different numbers of new tokens. "
                         "Give each alone, or set a smaller max_new_tokens.")  # fmt: skip
    output: Any = None
    counts, words = torch.tensor([]), dict[int, Tensor]()
    for limit in sorted({*limits}):
        rows, settings.max_new_tokens = [row for row, own in enumerate(limits) if own == limit], limit
        output, new, counts = latent.answer([prompts[row] for row in rows], samples, settings, tokenizer, others)
        words |= {row * samples + n: new[i * samples + n] for i, row in enumerate(rows) for n in range(samples)}
    new = torch.nn.utils.rnn.pad_sequence([words[row] for row in sorted(words)], True, latent.special.pad)
    chosen = torch.tensor([[latent.special.control[name]] if name else [] for name in modes]).to(new)
    sequences = torch.cat([given.to(new), chosen.repeat_interleave(samples, dim=0), new], dim=1)
    if not settings.return_dict_in_generate:
        return sequences
    output["sequences"], output["num_thoughts"] = sequences, counts.repeat_interleave(samples)
    return output


def _settings(model: Any, given: GenerationConfig | None, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """All settings of the generation, and the arguments that are none, after those that cannot be were refused."""
    ignored = ("custom_generate", "trust_remote_code", "revision", "token", "token_type_ids")
    options = {name: value for name, value in options.items() if value is not None and name not in ignored}
    settings: Any = GenerationConfig() if given is None else copy.deepcopy(given)
    asked = {**settings.to_diff_dict(), **options}
    for name, (neutral, reason) in REFUSED.items():
        if asked.get(name, neutral) != neutral:
            raise ValueError(f"{name} {reason}.")
    settings.update(**model.generation_config.to_dict(), defaults_only=True)
    others = settings.update(**options)
    if (kind := settings.get_generation_mode().value) not in ("greedy_search", "sample"):
        raise ValueError(f"{kind} cannot be combined with thoughts. Decode greedily, or sample with do_sample=True.")
    if settings.do_sample and settings.top_k is None:
        settings.top_k = 0  # transformers' default is 50
    return settings, others


class LatentReasoning:
    """How a model reasons, and the passes that make its thoughts."""

    def __init__(self, model: Any):
        self.model, self.place, self.device = model, model.name_or_path, model.device
        with open(self._file("coconut.json"), encoding="utf-8") as file:
            record = json.load(file)
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"{self.place} has the format {record['format_version']}, and its generate.py knows "
                             f"{FORMAT_VERSION}. Export the model again.")  # fmt: skip
        self.special, self.reasoning = SimpleNamespace(**record["special"]), SimpleNamespace(**record["reasoning"])
        self.layout = SimpleNamespace(**record["reasoning"]["slot"])  # between question and answer
        self.slot = SimpleNamespace(**record["feedback"])  # what thoughts are made of
        for name, known in KNOWN.items():
            if (value := getattr(self.slot, name)) not in known:
                raise ValueError(f"{name}={value} of thoughts is not supported. generate.py knows {', '.join(known)}.")
        special, slot = self.special, self.slot
        self.added = [special.bot, special.eot, special.latent, special.pause]
        self.added += [*special.control.values(), *special.rates]
        self.feedback = self._weights("feedback.safetensors") if slot.projector != "none" else {}
        self.gates = self._weights("gates.safetensors") if self.reasoning.gated else {}
        self.reads_layer = slot.content == "fused" and slot.alpha > 0 and slot.layer != -1
        self.embed, self.config = model.get_input_embeddings(), model.config.get_text_config(decoder=True)
        arguments = inspect.signature(model.base_model.forward).parameters
        self.cache_argument = "cache" if "cache" in arguments else "past_key_values"  # up to transformers 5.23

    def _file(self, name: str) -> str:
        try:
            return str(cached_file(self.place, name, revision=REVISION))
        except OSError as error:
            raise ValueError(f"There is no {name} in {self.place!r}, where this model was opened. Open the folder that "
                             "was exported, by a path that stays valid.") from error  # fmt: skip

    def _weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self._file(name), device=str(self.device))

    # --- prompts ------------------------------------------------------------------------------------

    def questions(self, ids_BT: Tensor, mask_BT: Tensor | None) -> list[list[int]]:
        """The tokens of each prompt, without padding."""
        if mask_BT is None and len(ids_BT) > 1 and (ids_BT[:, [0, -1]] == self.special.pad).any():
            raise ValueError("Several prompts need the tokenizer's attention_mask, which says what is padding.")
        is_token_BT = torch.ones_like(ids_BT).bool() if mask_BT is None else mask_BT.to(ids_BT.device).bool()
        rows = [ids[is_token].tolist() for ids, is_token in zip(ids_BT, is_token_BT, strict=True)]
        for number, row in enumerate(rows, 1):
            if not row:
                raise ValueError(f"Prompt {number} is empty.")
            if held := sorted({*row} & {*self.added}):
                raise ValueError(f"Prompt {number} holds the tokens {held}, which mark the thoughts of this model. "
                                 "Give the question alone: they are added to it.")  # fmt: skip
        return rows

    def choose_modes(self, rows: list[list[int]], mode: str | list[str] | None, settings: Any) -> list[str]:
        """The mode of each row: the given, the likeliest or a sampled one; empty for a model without modes."""
        names, method = self.reasoning.modes, self.reasoning.method
        if mode is not None:
            given = [mode] * len(rows) if isinstance(mode, str) else list(mode)
            if not {*given} <= {*names} or len(given) != len(rows):
                has = f"the modes {', '.join(names)}" if names else "no modes"
                raise ValueError(f"mode={mode}: {method} has {has}. Give one, or one for each of {len(rows)} answers.")
            return given
        if not names:
            return [""] * len(rows)
        ids_BT, mask_BT = self.pad(rows)
        last_BE = self.run(self.embed(ids_BT), mask_BT, self.new_cache())[:, -1]
        scores = self.logits(last_BE)[:, [self.special.control[name] for name in names]].float()
        probs = (scores / (settings.temperature or 1.0)).softmax(-1)
        chosen = torch.multinomial(probs, 1)[:, 0] if settings.do_sample else scores.argmax(-1)
        return [names[number] for number in chosen.tolist()]

    def prompt(self, question: list[int], mode: str, asked: int | None) -> Parts:
        """What stands before the thoughts, how many they are, and what stands after them, before the answer."""
        special, source, has_markers = self.special, self.layout.source, self.reasoning.markers
        if asked is not None and (mode or (source == "nothing" and asked)):
            how = "chooses it by its mode" if mode else "has neither thoughts nor pauses"
            raise ValueError(f"num_thoughts={asked}: {self.reasoning.method} {how}. Leave it out.")
        count: Any = self.reasoning.num_thoughts if asked is None else asked
        if mode:  # short, think, latent_K
            question, latent = [*question, special.control[mode]], re.fullmatch(r"latent_(\d+)", mode)
            source, has_markers, count = ("thought", True, int(latent[1])) if latent else ("nothing", False, 0)
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"num_thoughts is {count}. It must be a whole number, 0 or more.")
        begin = special.rates[self.layout.group - 1] if self.layout.max_group else special.bot
        before, after = ([*question, begin], [special.eot]) if has_markers else (question, [])
        if source == "pause":
            return [*before, *[special.pause] * count, *after], 0, []
        return (before, count, after) if source == "thought" else (before + after, 0, [])

    def limits(self, prompts: list[Parts], most: int) -> list[int]:
        """How many new tokens each prompt may get: at most `most`, and what the model's context has room for."""
        context = getattr(self.config, "max_position_embeddings", None) or 2**31
        rope = getattr(self.config, "rope_parameters", None) or {}
        for kind in (rope, *rope.values()):
            if isinstance(kind, dict) and kind.get("rope_type") == "longrope":  # other angles, once a row is longer
                context = min(context, kind.get("original_max_position_embeddings") or context)
        free = [context - len(before) - count - len(after) for before, count, after in prompts]
        if min(free) < 1:
            number = free.index(min(free))
            before, count, after = prompts[number]
            raise ValueError(f"Prompt {number + 1} has {len(before) + len(after)} tokens with its markers, and {count} "
                             f"thoughts. They leave no room for an answer in the model's context of {context} tokens. "
                             "Shorten the prompt, or set a smaller num_thoughts.")  # fmt: skip
        return [min(most, room) for room in free]

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T) of rows, padded on the left."""
        width = max(map(len, rows))
        ids = [[self.special.pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    # --- passes -------------------------------------------------------------------------------------

    def new_cache(self) -> Any:
        return DynamicCache(config=self.model.config)

    def run(self, embeds_BTD: Tensor, mask_BS: Tensor, cache: Any) -> Tensor:
        """Run inputs behind what the cache holds; the mask covers both. Gives what thoughts are made of, (B, T, E).

        That is the last hidden state, after the final norm; before it comes the state of a layer that the slot names.
        """
        positions_BT = mask_BS.cumsum(1).sub(1).clamp(min=0)[:, -embeds_BTD.shape[1] :]
        output = self.model.base_model(
            inputs_embeds=embeds_BTD, attention_mask=mask_BS, position_ids=positions_BT, use_cache=True,
            output_hidden_states=self.reads_layer, **{self.cache_argument: cache},
        )  # fmt: skip
        of_layer = [output.hidden_states[self.slot.layer]] if self.reads_layer else []
        return torch.cat([*of_layer, output.last_hidden_state], dim=-1)

    def logits(self, states: Tensor) -> Tensor:
        """(..., V) logits of the last hidden states in (..., E), scaled or capped where the model's family does so."""
        head, config = self.model.get_output_embeddings(), self.config
        logits = head(states[..., -self.embed.embedding_dim :]) * (getattr(config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    # --- thoughts -----------------------------------------------------------------------------------

    def thought(self, states: Tensor) -> Tensor:
        """(..., D) the thought after positions with the states (..., E): its content, through the projector."""
        slot, content = self.slot, states[..., : self.embed.embedding_dim]
        share = {"state": 1.0, "mixture": 0.0, "fused": slot.alpha}[slot.content]
        if share < 1:
            mixture = self.mixture(self.logits(states))
            content = share * content + (1 - share) * mixture if share else mixture
        if slot.projector == "mlp_ln":  # CODI
            content = self._layers("projector", content)
        elif slot.projector == "gaussian":  # CoLaR: the mean
            hidden, mean = self._layers("projector.trunk", content), "projector.mean"
            content = F.linear(hidden, self.feedback[f"{mean}.weight"], self.feedback[f"{mean}.bias"])
            content = content * self.feedback["projector.scale"]
        elif slot.projector == "multi_token":  # C-MTP: the likeliest words of the next group, up to <eot>, merged
            words_S = self.likeliest(self.logits(self.group(content)))
            is_word_S = (words_S != self.special.eot).long().cumprod(-1)
            count = is_word_S.sum(-1, keepdim=True).clamp(min=1).to(self.embed.weight)
            content = (self.embed(words_S) * is_word_S[..., None]).sum(-2)
            content = content / (count.sqrt() if slot.pooling == "sqrt" else count)
        return content.to(self.embed.weight)

    def _layers(self, prefix: str, states: Tensor) -> Tensor:
        """Linear, GELU, Linear, and a LayerNorm where there is one."""
        weights = [self.feedback.get(f"{prefix}.{n}.{part}") for n in (0, 2, 3) for part in ("weight", "bias")]
        first, first_bias, second, second_bias, norm, norm_bias = weights
        assert first is not None
        assert second is not None
        states = F.linear(F.gelu(F.linear(states.to(first), first, first_bias)), second, second_bias)
        return states if norm is None else F.layer_norm(states, norm.shape, norm, norm_bias)

    def mixture(self, logits: Tensor) -> Tensor:
        """(..., D) words' input embeddings, weighted by the distribution over the next word that the logits give."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = scores.index_fill(-1, torch.tensor(self.added, device=logits.device), -torch.inf)
        if not self.slot.top_k:
            table_VD = self.embed(torch.arange(logits.shape[-1], device=logits.device))
            return (scores / self.slot.temperature).softmax(-1).to(table_VD) @ table_VD
        best_M, words_M = scores.topk(min(self.slot.top_k, logits.shape[-1] - len(self.added)))
        return ((best_M / self.slot.temperature).softmax(-1)[..., None] * self.embed(words_M)).sum(-2)

    def group(self, states: Tensor) -> Tensor:
        """(..., S, D) states of which the model's head makes the words of the next group."""
        words = self._layers("projector.layers", states)
        return words.unflatten(-1, (-1, self.embed.embedding_dim)).to(self.embed.weight)

    def likeliest(self, logits: Tensor) -> Tensor:
        """(...) the likeliest words of logits (..., V). Of the added tokens only `<eot>` may be among them."""
        never = [token for token in self.added if token != self.special.eot]
        return logits.index_fill(-1, torch.tensor(never, device=logits.device), -torch.inf).argmax(-1)

    def ends(self, states_BD: Tensor) -> Tensor:
        """(B,) where the model says `<eot>` in the place of the next thought, if it ends its thoughts itself."""
        if self.slot.update != "teacher_forced" or self.reasoning.fixed_count:
            return torch.zeros(len(states_BD), dtype=torch.bool, device=states_BD.device)
        states_BD = self.group(states_BD)[:, 0] if self.slot.projector == "multi_token" else states_BD
        return self.likeliest(self.logits(states_BD)) == self.special.eot

    def think(self, rows: list[list[int]], most_B: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Run what stands before the thoughts, and as many thoughts as the row with the most has.

        Gives the thoughts (B, K, D), how many of them are a row's own (B,), and the cache, in which all of them are.
        """
        ids_BT, mask_BT = self.pad(rows)
        embeds_BTD, cache = self.embed(ids_BT), self.new_cache()
        last_BE = self.run(embeds_BTD, mask_BT, cache)[:, -1]
        if self.slot.update in ("jacobi", "loop"):
            return self.think_at_once(last_BE, mask_BT, cache, most_B), most_B, cache
        fed, counts_B = [embeds_BTD[:, :0]], torch.zeros_like(most_B)
        is_thinking_B = torch.ones_like(most_B).bool()
        for _ in range(int(most_B.max())):
            is_thinking_B = is_thinking_B & ~self.ends(last_BE)
            if not is_thinking_B.any():
                break
            fed.append(self.thought(last_BE)[:, None])
            counts_B = counts_B + is_thinking_B
            mask_BT = F.pad(mask_BT, (0, 1), value=1)
            last_BE = self.run(fed[-1], mask_BT, cache)[:, -1]
        return torch.cat(fed, dim=1), torch.minimum(counts_B, most_B), cache

    def think_at_once(self, last_BE: Tensor, mask_BT: Tensor, cache: Any, counts_B: Tensor) -> Tensor:
        """(B, K, D) thoughts that begin as latent tokens and are updated together, several times.

        Jacobi (PCCoT): each becomes the thought of the state before it. Loop (LOTUS): each becomes its token's
        embedding plus the thought of its own state.
        """
        slot, count = self.slot, int(counts_B.max())
        tokens_BKD = self.embed(torch.full((len(mask_BT), count), self.special.latent, device=self.device))
        updates_B = slot.iterations * (-(-counts_B // slot.iterations_per) if slot.iterations_per else counts_B**0)
        mask_BS, block_BKD = F.pad(mask_BT, (0, count), value=1), tokens_BKD
        for done in range(int(updates_B.max())):
            behind = copy.copy(cache)  # an update of a layer replaces its keys and values, so the cache stays as it is
            behind.layers = [copy.copy(layer) for layer in cache.layers]
            states_BKE = self.run(block_BKD, mask_BS, behind)
            before_BKE = torch.cat([last_BE[:, None], states_BKE[:, :-1]], dim=1)
            new_BKD = tokens_BKD + self.thought(states_BKE) if slot.update == "loop" else self.thought(before_BKE)
            block_BKD = torch.where((done < updates_B)[:, None, None], new_BKD, block_BKD)
        self.run(block_BKD, mask_BS, cache)
        return block_BKD

    # --- answers ------------------------------------------------------------------------------------

    def answer(
        self, prompts: list[Parts], samples: int, settings: Any, tokenizer: Any, others: dict[str, Any]
    ) -> tuple[Any, Tensor, Tensor]:
        """Think, then write. Gives transformers' output, the new tokens (B * samples, N), how many thoughts (B,)."""
        counts_B = torch.tensor([count for _, count, _ in prompts], device=self.device)
        fed_BKD, cache = None, None
        if counts_B.any():
            fed_BKD, counts_B, cache = self.think([before for before, _, _ in prompts], counts_B)
        rows = [[*before, *[self.special.latent] * count, *after]
                for (before, _, after), count in zip(prompts, counts_B.tolist(), strict=True)]  # fmt: skip
        ids_BT, mask_BT = self.pad(rows)
        if fed_BKD is not None and (counts_B != fed_BKD.shape[1]).any():  # rows end apart: run them again, aligned
            is_own_BK = torch.arange(fed_BKD.shape[1], device=self.device) < counts_B[:, None]
            embeds_BTD, cache = self.embed(ids_BT), self.new_cache()
            embeds_BTD[ids_BT == self.special.latent] = fed_BKD[is_own_BK]
            self.run(embeds_BTD[:, :-1], mask_BT[:, :-1], cache)
        settings, others = copy.deepcopy(settings), dict(others)
        if cache is not None:  # it holds all columns but the last
            cache.batch_repeat_interleave(samples)
            others[self.cache_argument] = cache
        ids_BT, mask_BT = ids_BT.repeat_interleave(samples, dim=0), mask_BT.repeat_interleave(samples, dim=0)
        settings.suppress_tokens = sorted({*(settings.suppress_tokens or ()), *self.added})
        if settings.stop_strings or self.gates:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(self.place, revision=REVISION)
        if settings.stop_strings:
            stops = StopStrings(tokenizer, settings.stop_strings, ids_BT.shape[1])
            others["stopping_criteria"] = StoppingCriteriaList([*others.get("stopping_criteria", ()), stops])
            settings.stop_strings = None
        gated = GatedWords(self, tokenizer) if self.gates else None
        if gated:
            others["logits_processor"] = LogitsProcessorList([*others.get("logits_processor", ()), gated])
        with self.embed.register_forward_hook(gated.mix) if gated else nullcontext():
            output = type(self.model).generate(
                self.model, input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings, **others
            )
        sequences = output.sequences if settings.return_dict_in_generate else output
        return output, sequences[:, ids_BT.shape[1] :], counts_B


class StopStrings:
    """Ends a row whose new text contains one of the texts. transformers' own cannot read a vocabulary of words."""

    def __init__(self, tokenizer: Any, texts: str | list[str], width: int):
        self.tokenizer, self.texts, self.width = tokenizer, [texts] if isinstance(texts, str) else texts, width

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        rows = self.tokenizer.batch_decode(input_ids[:, self.width :], clean_up_tokenization_spaces=False)
        return torch.tensor([any(text in row for text in self.texts) for row in rows], device=input_ids.device)


class GatedWords:
    """Mixes what a step expected into the word that was chosen, up to the answer mark (HRPO, arXiv 2505.18454).

    As a logits processor it takes the expected embedding h of the step's distribution. As a hook of the input
    embeddings it turns the embedding e of the word that follows into a e + sqrt(1 - a^2) i h, where
    a = exp(-8 softplus(-Lambda) sigmoid(Linear_r(e))) and i = sigmoid(Linear_i(e)).
    """

    def __init__(self, latent: LatentReasoning, tokenizer: Any):
        self.weights, self.tokenizer, self.temperature = latent.gates, tokenizer, latent.reasoning.gated["temperature"]
        self.mark = latent.reasoning.format["answer"].split("{}")[0].strip()
        self.table_VD = latent.embed(torch.arange(latent.embed.num_embeddings, device=latent.device))
        self.words: list[Tensor] = []
        self.is_reasoning_B = torch.tensor(True, device=latent.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs_BV, table_VD = (scores / self.temperature).softmax(-1), self.table_VD[: scores.shape[1]]
        self.expected_BD = probs_BV.to(table_VD) @ table_VD / probs_BV.norm(dim=-1, keepdim=True).to(table_VD)
        return scores

    def mix(self, module: Any, arguments: tuple[Tensor], embeds_B1D: Tensor) -> Tensor:
        if not hasattr(self, "expected_BD"):  # the prompt
            return embeds_B1D
        self.words.append(arguments[0][:, -1])
        last_BN = torch.stack(self.words[-len(self.mark.encode()) :], dim=1)  # a token has a byte at least
        texts = self.tokenizer.batch_decode(last_BN, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        is_marked_B = torch.tensor([self.mark in text for text in texts], device=last_BN.device)
        self.is_reasoning_B = self.is_reasoning_B & ~is_marked_B
        sharp_D = self.weights["Lambda"]
        e_BD, h_BD = embeds_B1D[:, 0].to(sharp_D), self.expected_BD.to(sharp_D)
        r_BD, i_BD = (F.linear(e_BD, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]).sigmoid()
                      for name in ("recurrence", "input"))  # fmt: skip
        log_a_BD = -8 * F.softplus(-sharp_D) * r_BD
        mixed_BD = log_a_BD.exp() * e_BD + (-torch.expm1(2 * log_a_BD)).sqrt() * i_BD * h_BD
        return torch.where(self.is_reasoning_B[:, None, None], mixed_BD.to(embeds_B1D)[:, None], embeds_B1D)
