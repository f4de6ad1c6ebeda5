"""The pocket base's language model: it binds keys to values in text and describes single pictures; no more.

Its start is built by hand: an *induction circuit*, the pair of attention layers that large models are known to form in
pre-training (Olsson et al., arXiv 2209.11895). In one layer every head looks one token back; in the next the query is
this token and the key is what the first layer wrote about the token before, so that "A B ... A" is answered by "B".
From a random start that circuit does not form in what a CPU can afford; from this start ordinary training makes it
work for chat turns, long names and fuzzy keys. The model card says so.

What it is trained on (no labelled picture among other pictures, ever: that is left to the adapter):

    pairs      short text: key value . key value . ... asked again
    chat       the same as chat turns; keys of 1 to 4 words, some words redrawn, so that the match is fuzzy
    repeat     a sequence, and the sequence again
    picture    one picture, or several each asked about alone: its name, its kind, yes or no
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from tools.pocket import tokenizer as tk

IGNORED = -100
KIND_QUESTION = "What kind of thing is this?"


def llava_config(vision: CLIPVisionConfig, tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 4) -> LlavaConfig:
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(tk.IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=True,
    )


def standardise(projector: nn.Module, features: torch.Tensor) -> None:
    """Make the projector's first layer a random frame of the features, standardised by their mean and spread over pictures.

    It is not trained in the base: what training classes have no use for would be lost on the way, and classes that are
    not known yet may need it. ``features`` [N, tokens, hidden].
    """
    mean, spread = features.mean((0, 1)), features.std((0, 1)) + 1e-6
    first = projector.linear_1
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        nn.init.orthogonal_(first.weight)
        first.weight /= spread
        first.bias.copy_(-(first.weight @ mean))


def induction_start(
    model: LlavaForConditionalGeneration, look_back: int = 1, match: int = 2, sharpness: float = 8.0, keys: float = 2.5, copy: float = 1.2
) -> None:
    """Write the induction circuit into layers ``look_back`` and ``match``.

    Looking one token back needs something all tokens share (a direction ``u`` added to every embedding and to the
    projector's bias) and RoPE's own rotation; matching uses RoPE's low frequencies alone, so that distance does not
    matter.
    """
    language = model.model.language_model
    config = language.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = hidden // heads
    inverse = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    scale = (hidden / 2) ** 0.5

    def frame() -> torch.Tensor:
        return torch.linalg.qr(torch.randn(hidden, size))[0].T

    with torch.no_grad():
        u = functional.normalize(torch.randn(hidden), dim=0)
        table = language.embed_tokens.weight
        table.normal_()
        table -= (table @ u)[:, None] * u
        table /= table.norm(dim=1, keepdim=True)
        table += u
        model.model.multi_modal_projector.linear_2.bias += u

        def without_u(weight: torch.Tensor) -> torch.Tensor:
            return weight - (weight @ u)[:, None] * u

        back, find = language.layers[look_back].self_attn, language.layers[match].self_attn
        key = torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
        query = torch.cat([inverse.cos(), -inverse.sin()])
        written = torch.zeros(hidden, hidden)
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            back.q_proj.weight[rows] += sharpness / scale * query[:, None] * u
            back.k_proj.weight[rows] += sharpness / scale * key[:, None] * u
            read, write = without_u(frame()), frame().T
            back.v_proj.weight[rows] += read
            back.o_proj.weight[:, rows] += 2.0 / scale * write
            written += write @ read
        slow = torch.cat([inverse < 0.03] * 2).float()
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            probe, value = without_u(frame()) * slow[:, None], without_u(frame())
            find.q_proj.weight[rows] += keys * probe
            find.k_proj.weight[rows] += keys * probe @ written.T
            find.v_proj.weight[rows] += value
            find.o_proj.weight[:, rows] += copy / scale * value.T


@dataclass
class Phrases:
    """How turns are worded; the same wording that episodes use later, so that only the pictures are new to the adapter."""

    instruction: str
    question: str
    query: str


@dataclass
class Pictures:
    """Training pictures as the tower sees them. ``features`` [N, tokens, hidden]; the rest has one entry a picture."""

    features: torch.Tensor
    names: list[str]
    kinds: list[str]


Row = tuple[list[int], list[int], list[int]]  # token ids, labels (IGNORED where not learned), picture indices


class Tasks:
    """Draws training rows. Every draw comes from ``rng``, so a step's rows depend on (seed, step) alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pictures: Pictures, words: Sequence[str], phrases: Phrases) -> None:
        def ids(text: str) -> list[int]:
            encoded: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return encoded

        special: dict[str, int] = {token: tokenizer.convert_tokens_to_ids(token) for token in tk.SPECIAL}
        self.bos, self.eos, self.pad = special[tk.BOS], special[tk.EOS], special[tk.PAD]
        self.user, self.assistant = special[tk.USER], special[tk.ASSISTANT]
        self.vocabulary = len(tokenizer)
        self.pictures = pictures
        self.picture = [special[tk.IMAGE]] * pictures.features.shape[1] + ids("\n")
        self.words = [ids(w) for w in words]
        self.spaced = [ids(" " + w) for w in words]
        self.short = [i for i, word in enumerate(self.spaced) if len(word) == 1]
        self.strings = [ids(s) for s in tk.random_strings(20_000, np.random.default_rng(1))]
        self.ask, self.ask_first = ids(phrases.question), ids(f"{phrases.instruction} {phrases.question}")
        self.ask_last, self.ask_kind = ids(phrases.query), ids(KIND_QUESTION)
        self.names = [ids(n) for n in pictures.names]
        self.kinds = [ids(k) for k in pictures.kinds]
        self.all_kinds = sorted(set(pictures.kinds))
        self.yes, self.no, self.stop = ids("yes"), ids("no"), ids(".")
        self.is_it = {kind: ids(f"Is this a {kind}?") for kind in self.all_kinds}

    def values(self, rng: np.random.Generator, count: int) -> list[list[int]]:
        """``count`` names with different first tokens, 80 % random strings, the rest words."""
        chosen: list[list[int]] = []
        pool = self.strings if rng.random() < 0.8 else self.words
        while len(chosen) < count:
            value = pool[rng.integers(len(pool))]
            if all(value[0] != other[0] for other in chosen):
                chosen.append(value)
        return chosen

    def pairs(self, rng: np.random.Generator) -> Row:
        n = int(rng.integers(2, 7))
        keys = [self.spaced[i] for i in rng.choice(len(self.spaced), n, replace=False)]
        values = self.values(rng, n)
        row, labels, seen = [self.bos], [IGNORED], set()
        for which in [*rng.permutation(n), *rng.integers(0, n, 8)]:
            answer = values[which] + self.stop
            row += keys[which] + answer
            labels += [IGNORED] * len(keys[which]) + (answer if which in seen else [IGNORED] * len(answer))
            seen.add(which)
        return row, labels, []

    def chat(self, rng: np.random.Generator) -> Row:
        """Long keys are fuzzy, as pictures are: words redrawn at every mention, and in half of them many words in common."""
        n, shots, length = int(rng.integers(2, 5)), int(rng.integers(1, 4)), int(rng.choice([1, 2, 4, 9, 9]))
        redraw = float(rng.choice([0, 0.25, 0.4])) if length > 2 else 0.25 * (length - 1)
        pool = np.array(self.short if length > 2 else range(len(self.spaced)))
        keys = rng.choice(pool, (n, length))
        if length > 2 and rng.random() < 0.5:
            keys = np.where(rng.random((n, length)) < 0.5, rng.choice(pool, length), keys)
        values = self.values(rng, n)
        support = rng.permutation(np.repeat(np.arange(n), shots))
        queries = rng.integers(0, n, 4)
        instructed, marked = rng.random() < 0.5, rng.random() < 0.5
        row, labels, seen = [self.bos], [IGNORED], set()
        for turn, which in enumerate([*support, *queries]):
            words = np.where(rng.random(length) < redraw, rng.choice(pool, length), keys[which])
            ask = self.ask_first if instructed and turn == 0 else self.ask_last if marked and turn >= len(support) else self.ask
            prompt = [self.user, *(t for w in words for t in self.spaced[w]), self.picture[-1], *ask, self.assistant]
            answer = [*values[which], self.eos]
            row += prompt + answer
            labels += [IGNORED] * len(prompt) + (answer if which in seen else [IGNORED] * len(answer))
            seen.add(which)
        return row, labels, []

    def repeat(self, rng: np.random.Generator) -> Row:
        sequence = rng.integers(len(tk.SPECIAL), self.vocabulary, rng.integers(5, 16)).tolist()
        return [self.bos, *sequence, *sequence], [IGNORED] * (len(sequence) + 2) + sequence[1:], []

    def picture_turns(self, rng: np.random.Generator, turns: int) -> Row:
        row, labels, used = [self.bos], [IGNORED], rng.integers(0, len(self.names), turns).tolist()
        for index in used:
            kind, draw = self.pictures.kinds[index], rng.random()
            if draw < 0.6:
                ask, answer = (self.ask_last if rng.random() < 0.3 else self.ask), self.names[index]
            elif draw < 0.8:
                ask, answer = self.ask_kind, self.kinds[index]
            else:
                asked = kind if rng.random() < 0.5 else str(rng.choice([k for k in self.all_kinds if k != kind]))
                ask, answer = self.is_it[asked], self.yes if asked == kind else self.no
            prompt = [self.user, *self.picture, *ask, self.assistant]
            row += [*prompt, *answer, self.eos]
            labels += [IGNORED] * len(prompt) + [*answer, self.eos]
        return row, labels, used

    def batch(self, rng: np.random.Generator, warm: bool) -> dict[str, torch.Tensor]:
        """One kind of row a batch; while ``warm``, short text pairs alone."""
        kinds: list[tuple[float, int, Callable[[np.random.Generator], Row]]] = [
            (2.0, 32, self.pairs),
            (3.5, 24, self.chat),
            (0.5, 32, self.repeat),
            (2.0, 64, lambda r: self.picture_turns(r, 1)),
            (1.5, 24, lambda r: self.picture_turns(r, int(r.integers(2, 5)))),
        ]
        weights = np.array([weight for weight, _, _ in kinds])
        pick = 0 if warm else int(rng.choice(len(kinds), p=weights / weights.sum()))
        _, count, make = kinds[pick]
        return self.collate([make(rng) for _ in range(count)]) | {"kind": torch.tensor(pick)}

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        longest = max(len(r[0]) for r in rows)
        ids = torch.tensor([r[0] + [self.pad] * (longest - len(r[0])) for r in rows])
        labels = torch.tensor([r[1] + [IGNORED] * (longest - len(r[1])) for r in rows])
        return {"ids": ids, "labels": labels, "pictures": torch.tensor([p for r in rows for p in r[2]], dtype=torch.long)}


def loss_and_accuracy(model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], features: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Cross entropy over the labelled tokens alone, and the share of them that greedy decoding would get right."""
    ids, labels = batch["ids"], batch["labels"]
    embedded = model.get_input_embeddings()(ids)
    if len(batch["pictures"]):
        projected = model.model.multi_modal_projector(features[batch["pictures"]])
        embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], projected.reshape(-1, embedded.shape[-1]))
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    where = labels[:, 1:] != IGNORED
    logits, targets = model.lm_head(hidden[:, :-1][where]), labels[:, 1:][where]
    return functional.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean().item()


def train(model: LlavaForConditionalGeneration, tasks: Tasks, state: Path, steps: int = 3000, rate: float = 1e-3, seed: int = 0) -> dict[str, float]:
    """Train language model and projector; the tower stays as it is. Goes on from ``state`` where that exists.

    Returns the last running accuracy of each kind of row.
    """
    names = ("pairs", "chat", "repeat", "picture", "pictures")
    trained = [p for n, p in model.named_parameters() if "vision_tower" not in n and "projector.linear_1" not in n]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def factor(step: int) -> float:
        progress = step / steps
        return min(1.0, (step + 1) / 100) * (1.0 if progress < 0.6 else max(0.03, (1 - progress) / 0.4))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    running: dict[str, float] = {}
    start = 0
    if state.exists():
        kept: dict[str, Any] = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"], strict=False)
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        start, running = kept["step"], kept["running"]
    began = time.monotonic()
    for step in range(start, steps):
        batch = tasks.batch(np.random.default_rng([seed, step]), warm=step < 200)
        loss, accuracy = loss_and_accuracy(model, batch, tasks.pictures.features)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        kind = names[int(batch["kind"])]
        running[kind] = 0.95 * running.get(kind, accuracy) + 0.05 * accuracy
        if (step + 1) % 100 == 0:
            shown = " ".join(f"{k} {v:.3f}" for k, v in sorted(running.items()))
            print(f"language step {step + 1}/{steps} {shown} ({time.monotonic() - began:.0f} s)", flush=True)
        if (step + 1) % 500 == 0:
            weights = {n: p for n, p in model.state_dict().items() if "vision_tower" not in n}
            partial = state.with_suffix(".partial")
            torch.save(
                {"model": weights, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step + 1, "running": running},
                partial,
            )
            partial.rename(state)
    return running
