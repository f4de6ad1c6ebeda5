"""The pocket base's language model.

It learns to bind keys to values in text and to describe single pictures, and nothing else.

Its initial weights contain an *induction circuit*: the pair of attention layers that large models form in pre-training
(Olsson et al., arXiv 2209.11895). In the first layer every head attends to the previous token. In the second layer the
query is the current token, and the key is what the first layer wrote about the previous token. So the circuit completes
"A B ... A" with "B". From random weights the circuit does not form in a training that a CPU can afford. From these
weights ordinary training makes it work for chat turns, long names and fuzzy keys. The model card says so.

The training tasks follow. None shows a labelled picture among other pictures, because that is what the adapter has to
learn.

    pairs      short text: key value . key value . ..., and some of the keys again
    chat       the same as chat turns; keys of 1, 2, 4 or 9 words; some words are redrawn, so that the match is fuzzy
    repeat     a sequence, twice
    picture    one picture, or several independent ones: its name, its kind, yes or no

Shapes: B rows of a batch, T tokens, N training pictures, M pictures in a batch, P patches of a picture, C width of the
tower, D width of the language model, S width of an attention head, V words of the vocabulary, L learned tokens of a
batch.
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

from lcl_adapter.files import whole_file
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


def standardise(projector: nn.Module, features_NPC: torch.Tensor) -> None:
    """Make the projector's first layer a random orthogonal map of the features, standardised over the pictures.

    The layer is not trained further. Training would discard what does not help on training classes, and new classes may
    need it.
    """
    mean_C, spread_C = features_NPC.mean((0, 1)), features_NPC.std((0, 1)) + 1e-6
    first = projector.linear_1
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        nn.init.orthogonal_(first.weight)
        first.weight /= spread_C
        first.bias.copy_(-(first.weight @ mean_C))


def induction_start(
    model: LlavaForConditionalGeneration, look_back: int = 1, match: int = 2, sharpness: float = 8.0, keys: float = 2.5, copy: float = 1.2
) -> None:
    """Write the induction circuit into layers ``look_back`` and ``match``.

    Attending to the previous token needs RoPE's rotation and a direction that all tokens share: ``shared_D``, which is
    added to every embedding and to the projector's bias. Matching uses only RoPE's low frequencies, so that the
    distance does not matter.
    sharpness, keys, copy: sizes of the weights that attend to the previous token, match, and copy.
    """
    language = model.model.language_model
    config = language.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = hidden // heads
    inverse = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    scale = (hidden / 2) ** 0.5

    def random_frame() -> torch.Tensor:
        """Random orthonormal rows, [S, D]."""
        return torch.linalg.qr(torch.randn(hidden, size))[0].T

    with torch.no_grad():
        shared_D = functional.normalize(torch.randn(hidden), dim=0)
        table_VD = language.embed_tokens.weight
        table_VD.normal_()
        table_VD -= (table_VD @ shared_D)[:, None] * shared_D
        table_VD /= table_VD.norm(dim=1, keepdim=True)
        table_VD += shared_D
        model.model.multi_modal_projector.linear_2.bias += shared_D

        def without_shared(weight_SD: torch.Tensor) -> torch.Tensor:
            return weight_SD - (weight_SD @ shared_D)[:, None] * shared_D

        back, find = language.layers[look_back].self_attn, language.layers[match].self_attn
        key_S = torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
        query_S = torch.cat([inverse.cos(), -inverse.sin()])
        written_DD = torch.zeros(hidden, hidden)  # what the first layer writes about the previous token
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            back.q_proj.weight[rows] += sharpness / scale * query_S[:, None] * shared_D
            back.k_proj.weight[rows] += sharpness / scale * key_S[:, None] * shared_D
            read_SD, write_DS = without_shared(random_frame()), random_frame().T
            back.v_proj.weight[rows] += read_SD
            back.o_proj.weight[:, rows] += 2.0 / scale * write_DS
            written_DD += write_DS @ read_SD
        slow_S = torch.cat([inverse < 0.03] * 2).float()
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            probe_SD, value_SD = without_shared(random_frame()) * slow_S[:, None], without_shared(random_frame())
            find.q_proj.weight[rows] += keys * probe_SD
            find.k_proj.weight[rows] += keys * probe_SD @ written_DD.T
            find.v_proj.weight[rows] += value_SD
            find.o_proj.weight[:, rows] += copy / scale * value_SD.T


@dataclass
class Phrases:
    """The wording of the turns. Episodes use the same wording later, so that only the pictures are new to the adapter."""

    instruction: str
    question: str
    query: str


@dataclass
class Pictures:
    """Training pictures: the tower's features [N, P, C], and one name and one kind per picture."""

    features: torch.Tensor
    names: list[str]
    kinds: list[str]


Row = tuple[list[int], list[int], list[int]]  # token ids, labels (IGNORED where not learned), picture indices


class Tasks:
    """Draws training rows. Every draw comes from ``rng``, so the rows of a step depend only on (seed, step)."""

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
        """Draw ``count`` names with different first tokens: random strings (80 %) or words."""
        chosen: list[list[int]] = []
        pool = self.strings if rng.random() < 0.8 else self.words
        while len(chosen) < count:
            value = pool[rng.integers(len(pool))]
            if all(value[0] != other[0] for other in chosen):
                chosen.append(value)
        return chosen

    def pairs(self, rng: np.random.Generator) -> Row:
        """Keys with their values. A value is learned from its second mention on."""
        n = int(rng.integers(2, 7))
        keys = [self.spaced[i] for i in rng.choice(len(self.spaced), n, replace=False)]
        values = self.values(rng, n)
        row, labels, mentioned = [self.bos], [IGNORED], set()
        for index in [*rng.permutation(n), *rng.integers(0, n, 8)]:
            answer = values[index] + self.stop
            row += keys[index] + answer
            labels += [IGNORED] * len(keys[index]) + (answer if index in mentioned else [IGNORED] * len(answer))
            mentioned.add(index)
        return row, labels, []

    def chat(self, rng: np.random.Generator) -> Row:
        """Pairs as chat turns.

        Long keys are fuzzy, like pictures: words are redrawn at every mention, and half of the rows have keys that
        share many words.
        """
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
        row, labels, mentioned = [self.bos], [IGNORED], set()
        for turn, index in enumerate([*support, *queries]):
            words = np.where(rng.random(length) < redraw, rng.choice(pool, length), keys[index])
            ask = self.ask_first if instructed and turn == 0 else self.ask_last if marked and turn >= len(support) else self.ask
            prompt = [self.user, *(t for w in words for t in self.spaced[w]), self.picture[-1], *ask, self.assistant]
            answer = [*values[index], self.eos]
            row += prompt + answer
            labels += [IGNORED] * len(prompt) + (answer if index in mentioned else [IGNORED] * len(answer))
            mentioned.add(index)
        return row, labels, []

    def repeat(self, rng: np.random.Generator) -> Row:
        """A random sequence twice. The second one is learned, except its first token."""
        sequence = rng.integers(len(tk.SPECIAL), self.vocabulary, rng.integers(5, 16)).tolist()
        return [self.bos, *sequence, *sequence], [IGNORED] * (len(sequence) + 2) + sequence[1:], []

    def picture_turns(self, rng: np.random.Generator, turns: int) -> Row:
        """Questions about ``turns`` independent pictures: the name (60 %), the kind (20 %), yes or no (20 %)."""
        row, labels, used = [self.bos], [IGNORED], rng.integers(0, len(self.names), turns).tolist()
        for index in used:
            kind, draw = self.pictures.kinds[index], rng.random()
            if draw < 0.6:
                ask, answer = (self.ask_last if rng.random() < 0.3 else self.ask), self.names[index]
            elif draw < 0.8:
                ask, answer = self.ask_kind, self.kinds[index]
            else:
                guess = kind if rng.random() < 0.5 else str(rng.choice([k for k in self.all_kinds if k != kind]))
                ask, answer = self.is_it[guess], self.yes if guess == kind else self.no
            prompt = [self.user, *self.picture, *ask, self.assistant]
            row += [*prompt, *answer, self.eos]
            labels += [IGNORED] * len(prompt) + [*answer, self.eos]
        return row, labels, used

    def batch(self, rng: np.random.Generator, warm: bool) -> dict[str, torch.Tensor]:
        """A batch of rows of one task. During warm-up (``warm``) the task is always ``pairs``."""
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
        """Pad rows to tensors: "ids" and "labels" [B, T], and "pictures" [M], the indices of the pictures in order."""
        longest = max(len(ids) for ids, _, _ in rows)
        ids_BT = torch.tensor([ids + [self.pad] * (longest - len(ids)) for ids, _, _ in rows])
        labels_BT = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels, _ in rows])
        pictures_M = torch.tensor([index for _, _, pictures in rows for index in pictures], dtype=torch.long)
        return {"ids": ids_BT, "labels": labels_BT, "pictures": pictures_M}


def loss_and_accuracy(model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], features_NPC: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Cross entropy over the learned tokens, and the share of them that greedy decoding would get right."""
    ids_BT, labels_BT, pictures_M = batch["ids"], batch["labels"], batch["pictures"]
    embedded_BTD = model.get_input_embeddings()(ids_BT)
    if len(pictures_M):
        projected_MPD = model.model.multi_modal_projector(features_NPC[pictures_M])
        image_tokens_BT1 = (ids_BT == model.config.image_token_id)[..., None]
        embedded_BTD = embedded_BTD.masked_scatter(image_tokens_BT1, projected_MPD.reshape(-1, embedded_BTD.shape[-1]))
    hidden_BTD = model.model.language_model(inputs_embeds=embedded_BTD, use_cache=False).last_hidden_state
    learned = labels_BT[:, 1:] != IGNORED
    logits_LV, targets_L = model.lm_head(hidden_BTD[:, :-1][learned]), labels_BT[:, 1:][learned]
    return functional.cross_entropy(logits_LV, targets_L), (logits_LV.argmax(-1) == targets_L).float().mean().item()


def train(model: LlavaForConditionalGeneration, tasks: Tasks, state: Path, steps: int = 3000, rate: float = 1e-3, seed: int = 0) -> dict[str, float]:
    """Train the language model and the projector's second layer.

    Training continues from the file ``state`` if it exists.

    Returns the last running accuracy of each task.
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
        saved: dict[str, Any] = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start, running = saved["step"], saved["running"]
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
            accuracies = " ".join(f"{name} {value:.3f}" for name, value in sorted(running.items()))
            print(f"language step {step + 1}/{steps} {accuracies} ({time.monotonic() - began:.0f} s)", flush=True)
        if (step + 1) % 500 == 0:
            weights = {n: p for n, p in model.state_dict().items() if "vision_tower" not in n}
            parts = {"model": weights, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step + 1}
            with whole_file(state) as partial:
                torch.save({**parts, "running": running}, partial)
    return running
