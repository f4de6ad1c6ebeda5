"""Sources of type ``self``: the base answers their prompts before training, and its answers are stored with the run.

The answers of a source are in ``replay/<source>.json`` of the run's folder. They are used again where the base, its
precision, the prompts and the options are the same, so a resumed run trains on the same answers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from lcl_adapter import processes, reading
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.encoder import Encoder
from lcl_adapter.base.model import Base
from lcl_adapter.data.conversations import Turn, from_dialogues
from lcl_adapter.data.mixture import Mixture
from lcl_adapter.data.sources import Dialogue, QuestionPool, read_image
from lcl_adapter.data.sources.self_replay import OwnAnswer, SelfReplay, with_answer, with_answers
from lcl_adapter.errors import DataError, EpisodeError
from lcl_adapter.files import write_json
from lcl_adapter.randomness import generator
from lcl_adapter.terminal import console

FOLDER = "replay"
TOGETHER = 16  # prompts that are answered together
TOKENS = 4096  # of those prompts and their answers: bounds the memory of a pass


def has_prompts(mixture: Mixture) -> bool:
    """Whether a source waits for answers of the base."""
    return any(isinstance(pool, QuestionPool) and pool.new_tokens for pool in mixture.pools.values())


def answer_prompts(mixture: Mixture, base: Base, output: Path) -> Mixture:
    """The mixture with all prompts answered by ``base``, which has no adapter yet. ``output`` is the run's folder.

    The first process answers; the others read its file, so every process has to call it.
    Raises DataError where a source gets no answer that can be learned; RunError where the file cannot be written.
    """
    pools = dict(mixture.pools)
    for name, pool in mixture.pools.items():
        options = mixture.options[name]
        if not isinstance(options, SelfReplay) or not isinstance(pool, QuestionPool) or not pool.new_tokens:
            continue
        file = output / FOLDER / f"{name}.json"
        key = _key(base, pool, mixture.seed, options)
        if processes.is_first() and _stored(file, key, len(pool)) is None:
            began = time.monotonic()
            answers = _answers(name, pool, base, options, mixture.seed)
            write_json(file, {"key": key, "answers": [answer and asdict(answer) for answer in answers]})
            cut = sum(answer is not None and not answer.finished for answer in answers)
            seconds = time.monotonic() - began
            console.print(
                f"{name}: the base answered {len(pool):,} prompts in {seconds:.0f} s, {cut:,} answers are cut at {options.max_new_tokens} tokens",
                markup=False,
                highlight=False,
            )
        processes.barrier()
        stored = _stored(file, key, len(pool))
        if stored is None:
            raise DataError(f"{file}: cannot be read by every process. Put the run's folder where all processes see it.")
        pools[name] = with_answers(pool, stored)
    return Mixture(mixture.recipe, pools)


def _key(base: Base, pool: QuestionPool, seed: int, options: SelfReplay) -> str:
    """A hash of everything that the answers depend on."""
    facts = [base.checkpoint.hash(), base.precision, base.tiles, pool.fingerprint, seed if options.temperature else None]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _stored(file: Path, key: str, count: int) -> list[OwnAnswer | None] | None:
    """The stored answers; None where there are none with this key."""
    try:
        stored: dict[str, Any] = reading.read_json(file)
        answers = [answer and OwnAnswer(**answer) for answer in stored["answers"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answers if stored.get("key") == key and len(answers) == count else None


def _answers(name: str, pool: QuestionPool, base: Base, options: SelfReplay, seed: int) -> list[OwnAnswer | None]:
    """An answer to each prompt; None where it cannot be learned, or the prompt's picture cannot be read."""
    predictor = Predictor(base)
    answers: list[OwnAnswer | None] = [None] * len(pool)
    readable = [index for index, dialogue in enumerate(pool.dialogues) if _is_readable(dialogue)]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{name}: the base answers", total=len(readable))
        for batch in _batches(readable, pool, predictor.encoder):
            streams = [generator("own answer", name, seed, index) for index in batch]
            turns = [_turn(pool.dialogues[index]) for index in batch]
            for index, (ids, finished) in zip(batch, _generate(predictor, turns, streams, options), strict=True):
                answers[index] = _learnable(pool.dialogues[index], ids, finished, predictor.encoder, options.max_new_tokens)
            bar.advance(task, len(batch))
    return answers


def _turn(dialogue: Dialogue) -> Turn:
    return from_dialogues((dialogue,)).branches[0][0]


def _is_readable(dialogue: Dialogue) -> bool:
    try:
        for picture in dialogue.pictures:
            read_image(picture)
    except DataError as error:
        console.print(f"not asked about: {error}", style="yellow", markup=False, highlight=False)
        return False
    return True


def _batches(indices: Sequence[int], pool: QuestionPool, encoder: Encoder) -> Iterator[list[int]]:
    """Prompts that are answered together, at most ``TOGETHER``, and ``TOKENS`` with their answers."""
    batch: list[int] = []
    tokens = 0
    for index in indices:
        length = len(encoder.turns([_turn(pool.dialogues[index])], opened=True)[0]) + pool.new_tokens
        if batch and (len(batch) == TOGETHER or tokens + length > TOKENS):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += length
    if batch:
        yield batch


def _generate(
    predictor: Predictor, turns: Sequence[Turn], streams: Sequence[np.random.Generator], options: SelfReplay
) -> list[tuple[list[int], bool]]:
    """The tokens of an answer to each turn, and whether the base ended it."""
    ids: list[list[int]] = [[] for _ in turns]
    finished = [False] * len(turns)
    draw = _drawing(options.temperature)

    def choose(index: int, logits_V: torch.Tensor) -> int | None:
        token = draw(logits_V, streams[index])
        if token == predictor.encoder.eos:
            finished[index] = True
            return None
        ids[index].append(token)
        return token

    predictor.generate(predictor.prefill([()]), turns, choose, options.max_new_tokens)
    return list(zip(ids, finished, strict=True))


def _drawing(temperature: float) -> Callable[[torch.Tensor, np.random.Generator], int]:
    """A function that chooses a token by its logits [V]: the likeliest, or one drawn at a temperature."""

    def likeliest(logits_V: torch.Tensor, _: np.random.Generator) -> int:
        return int(logits_V.argmax())

    def drawn(logits_V: torch.Tensor, stream: np.random.Generator) -> int:
        cumulated_V = (logits_V.double() / temperature).softmax(-1).cumsum(-1)
        place = stream.random() * float(cumulated_V[-1])
        return min(int(torch.searchsorted(cumulated_V, place, right=True)), len(cumulated_V) - 1)

    return drawn if temperature else likeliest


def _learnable(dialogue: Dialogue, ids: list[int], finished: bool, encoder: Encoder, most: int) -> OwnAnswer | None:
    """The answer as text that training reads as at most ``most`` tokens; None where it cannot be learned.

    A text can have more tokens than were generated, for instance where they were no whole characters.
    """
    text = _text(ids, encoder)
    while ids and encoder.count_tokens([text])[0] > most:
        ids, finished = ids[:-1], False
        text = _text(ids, encoder)
    if (token := encoder.special_token_in(text)) is not None:
        text, finished = text[: text.index(token)].strip(), False
    answer = OwnAnswer(text, finished)
    try:
        encoder.conversation(from_dialogues((with_answer(dialogue, answer),)))
    except (DataError, EpisodeError):  # the tokenizer joins it to its prompt, or nothing of it is left
        return None
    return answer


def _text(ids: Sequence[int], encoder: Encoder) -> str:
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=True).strip())
