"""The one path to the model, for evaluation, the command line and serving.

``prefill`` reads a support set once and leaves it in the model's cache. ``ask`` puts questions behind it, several in one
row. The attention mask separates them: each question attends to the support set and to itself. The answers to score
follow their question in the same way, and so do generated tokens. Thus the support set is neither read again nor
copied. After each pass the cache is put back to the support set alone. ``run`` groups requests into batches that fit the
free memory.

    predictor = Predictor(base)
    prefilled = predictor.prefill([support_turns])
    predictor.ask(prefilled, [Question(0, query_turn, ("good", "scratched"))])

Shapes:
    S  support sets           P  tokens of the longest support set, padded on the left
    K  questions in a pass    T  tokens behind the support set in a pass, padded on the right
    G  generated tokens       N  places in [S, T] whose logits are computed
    V  vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import Cache

from lcl_adapter.answering import independent
from lcl_adapter.answering.batches import QUESTIONS_PER_PASS, Limits, SetOfRequests, room
from lcl_adapter.answering.cache import Part, Prefilled, new_cache
from lcl_adapter.answering.chunks import Share, in_orientations, orientation_of, parts_that_fit, shares_of
from lcl_adapter.answering.room import widths_of
from lcl_adapter.answering.rows import NO_SEGMENT, PADDING, EncodedQuestion, Ids, Row, without_ends
from lcl_adapter.base.encoder import Position, position_ids
from lcl_adapter.base.model import Base
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.data.conversations import Turn, oriented
from lcl_adapter.errors import EpisodeError

SupportTurns = tuple[Turn, ...]
Request = tuple[SupportTurns, Turn, tuple[str, ...]]  # support set, query, answers to score
Place = tuple[int, int]  # a row and a token in it
ReadTokens = Callable[[torch.Tensor], torch.Tensor]  # token ids [S, K] -> logits of the next tokens [S, K, V]


@dataclass(frozen=True)
class Question:
    """A query about the ``support``-th prefilled set.

    ``answers`` are the worded labels to score; none for free text.
    ended: whether the token that ends an answer counts. Without it, it counts only where one answer begins another.
    """

    support: int
    turn: Turn
    answers: tuple[str, ...] = ()
    ended: bool = True


@dataclass(frozen=True)
class Reply:
    """text: the greedy answer, "" if none was generated.

    log_likelihoods: one for each answer, its end token included where it counts. tokens: how many each of them is the sum of.
    """

    text: str
    log_likelihoods: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Over the given answers; they sum to 1."""
        top = max(self.log_likelihoods, default=0.0)
        weights = [math.exp(v - top) for v in self.log_likelihoods]
        return tuple(w / sum(weights) for w in weights)

    @property
    def decided(self) -> bool:
        """Whether the scores of the answers differ."""
        return max(self.log_likelihoods) > min(self.log_likelihoods)

    @property
    def best(self) -> int:
        """Index of the most likely answer."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)


def combined(replies: Sequence[Reply]) -> Reply:
    """The reply to one question by several parts of a support set: the mean of each answer's log-likelihoods."""
    means = tuple(sum(scores) / len(replies) for scores in zip(*(reply.log_likelihoods for reply in replies), strict=True))
    return Reply("", means, replies[0].tokens)


@dataclass
class Predictor:
    """Answers questions with one base: with its adapter, or without it inside ``base.without_adapter()``.

    batch_size: support sets in a pass, at most. pack: questions behind one support set in a pass, at most. ``run`` takes
    fewer of both where the free memory asks for it.
    """

    base: Base
    vision: VisionFeatures = field(default=None)  # type: ignore[assignment]
    batch_size: int = 32
    pack: int = QUESTIONS_PER_PASS
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        self.vision = self.vision or VisionFeatures(self.base)
        self.encoder = self.base.encoder()
        self.device = self.base.device
        self.widths = widths_of(self.base.llava.config.get_text_config())
        self.limits = Limits(self.widths, self.base.dtype.itemsize, self.device.type, self.batch_size, self.pack)

    def parts(self, turns: Sequence[Turn], behind: int) -> list[SupportTurns]:
        """What is prefilled of a support set, for :meth:`ask_parts` about its labels: its parts
        (:mod:`lcl_adapter.answering.chunks`), each in all orientations of the base.

        behind: tokens of a question and its longest answer.
        """
        return in_orientations(parts_that_fit(turns, self.encoder, behind, self.base.shots), self.base.orientations)

    @torch.inference_mode()
    def prefill(self, supports: Sequence[Sequence[Turn]], behind: int = 0, known: Sequence[Prefilled] = ()) -> Prefilled:
        """Read each support set once. Either all sets have turns, or none has.

        behind: tokens to reserve behind the longest set, so that questions which need no more are asked without a copy.
        known: sets that the same model has read. Examples of independent sets that they have are copied from there.
        Raises EpisodeError if a set leaves no room in the context; DataError for a broken picture.
        """
        rows = [self.encoder.support(turns) for turns in supports]
        length, needed = max(row.visible for row in rows), max(row.longest for row in rows)
        if needed >= self.encoder.context:
            raise EpisodeError(f"a support set of {needed} tokens does not fit the context of {self.encoder.context}: show fewer photos.")
        cache = new_cache(self.widths.layers, length + behind)
        mask_SP = torch.tensor([[0] * (length - row.visible) + [1] * row.visible for row in rows], dtype=torch.long, device=self.device)
        parts: tuple[tuple[tuple[Part, slice], ...], ...] = ()
        if any(row.examples for row in rows):
            parts = tuple(independent.parts_of(row, turns, length) for row, turns in zip(rows, supports, strict=True))
            independent.fill(cache, rows, parts, known, self._read_alone)
        elif length:
            ids_SP = torch.tensor([[self.encoder.pad] * (length - len(row)) + row.ids for row in rows], device=self.device)
            position_SP = position_ids([row.positions for row in rows], length, left=True).to(self.device)
            self._forward(ids_SP, mask_SP, position_SP, cache, [turn for support in supports for turn in self.encoder.as_read(support)], logits_at=1)
        next_position_S = torch.tensor([row.next_position for row in rows], device=self.device)
        return Prefilled(cache, mask_SP, next_position_S, tuple(row.longest for row in rows), parts, tuple(map(orientation_of, supports)))

    def _read_alone(self, rows: Sequence[tuple[Ids, Sequence[Position], Sequence[Turn]]], cache: Cache) -> None:
        """Read rows into an empty cache, padded on the right."""
        length = max(len(ids) for ids, _, _ in rows)
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _, _ in rows], device=self.device)
        positions = position_ids([own for _, own, _ in rows], length).to(self.device)
        ids_RL = self._padded([ids for ids, _, _ in rows], length, self.encoder.pad)
        self._forward(ids_RL, mask, positions, cache, [turn for _, _, turns in rows for turn in turns], logits_at=1)

    def ask(self, prefilled: Prefilled, questions: Sequence[Question], generate: bool = True) -> list[Reply]:
        """Replies in the order of the questions. ``prefilled`` is unchanged afterwards. A question is asked in the
        orientation of its set.

        generate: also generate a greedy answer to each question. Raises EpisodeError if a question does not fit the
        context; DataError for a broken picture.
        """
        queues: list[list[int]] = [[] for _ in range(prefilled.mask.shape[0])]
        for index, question in enumerate(questions):
            queues[question.support].append(index)
        turns = [oriented([one.turn], prefilled.orientations[one.support])[0] for one in questions]
        encoded = [[self._encoded(turns[i], questions[i].answers, prefilled.empty, questions[i].ended) for i in queue] for queue in queues]
        replies: dict[int, Reply] = {}
        for queue, own in zip(queues, self._ask_encoded(prefilled, encoded, generate, self.limits.pack), strict=True):
            replies.update(zip(queue, own, strict=True))
        return [replies[i] for i in range(len(questions))]

    def ask_parts(self, prefilled: Prefilled, questions: Sequence[Question], generate: bool = True) -> list[Reply]:
        """:meth:`ask`, where the sets in ``prefilled`` are the parts of one (:mod:`lcl_adapter.answering.chunks`). Of several parts
        no text is generated.
        """
        count = len(prefilled.longest)
        if count == 1:
            return self.ask(prefilled, questions, generate)
        replies = self.ask(prefilled, [replace(question, support=part) for question in questions for part in range(count)], generate=False)
        return [combined(replies[start : start + count]) for start in range(0, len(replies), count)]

    @torch.inference_mode()
    def generate(self, prefilled: Prefilled, turns: Sequence[Turn], choose: Callable[[int, torch.Tensor], int | None], new_tokens: int) -> None:
        """Generate an answer to each turn behind the one set in ``prefilled``, all of them together, token by token.

        choose: gets a turn's index and the logits [V] of its next token. It returns the token's id, or None to end this
        answer. It may raise. ``prefilled`` is unchanged afterwards in every case. Raises EpisodeError if there is no room.
        """
        row = Row.of(self._encoded(turn, (), prefilled.empty) for turn in turns)
        longest = prefilled.longest[0] + row.longest + new_tokens
        if longest > self.encoder.context:
            raise EpisodeError(f"the turns and up to {new_tokens} new tokens are {longest} tokens, the context is {self.encoder.context}.")
        segment_ST = self._padded([row.segment], len(row.ids), PADDING)
        with prefilled.room_for(len(row.ids) + new_tokens * len(turns)):
            logits_KV, _ = self._read_rows(prefilled, [row], segment_ST, turns)
            read_tokens = self._token_reader(prefilled, [row], segment_ST)
            unfinished = list(range(len(turns)))
            for remaining in range(new_tokens, 0, -1):
                chosen = {turn: choose(turn, logits_KV[turn]) for turn in unfinished}
                unfinished = [turn for turn in unfinished if chosen[turn] is not None]
                if not unfinished or remaining == 1:
                    return
                ids = [self.encoder.eos if (token := chosen.get(turn)) is None else token for turn in range(len(turns))]
                logits_KV = read_tokens(torch.tensor([ids], device=self.device))[0]

    def run(
        self, requests: Sequence[Request], generate: bool = True, done: Callable[[int], None] | None = None, new_tokens: int | None = None
    ) -> list[Reply]:
        """Replies to (support set, query, answers) in any mix, in their order.

        Equal support sets are read once. Those of similar length share a pass. done: called after each batch with the
        number of requests in it. new_tokens: how long a generated answer may be in this call.
        """
        if new_tokens is not None and new_tokens != self.max_new_tokens:
            other = replace(self, max_new_tokens=new_tokens)
            other.limits = self.limits  # as memory has shown them to be
            return other.run(requests, generate, done)
        shares = [shares_of(support, turn, self.base.shots, self.base.orientations) for support, turn, _ in requests]
        if any(len(parts) > 1 for parts in shares):
            return self._run_in_parts(requests, shares, generate, done)
        groups: dict[SupportTurns, list[int]] = {}
        for index, (support, _, _) in enumerate(requests):
            if support:
                groups.setdefault(support, []).append(index)
        by_length = sorted(groups.items(), key=lambda item: (len(item[0]), len(item[1]), sum(len(t.text) for t in item[0])))
        without_support = sorted((i for i, r in enumerate(requests) if not r[0]), key=lambda i: len(requests[i][1].text))
        replies: dict[int, Reply] = {}
        for same_kind in (by_length, [((), [i]) for i in without_support]):
            sets = (
                SetOfRequests(support, members, len(self.encoder.support(support)), [self._encoded(*requests[i][1:], not support) for i in members])
                for support, members in same_kind
            )
            for batch in self.limits.batches(sets, self.max_new_tokens if generate else 0):
                for part in self.limits.parts_that_fit(batch, partial(self._answer, generate)):
                    replies.update(part)
                    if done:
                        done(len(part))
        return [replies[i] for i in range(len(requests))]

    def _run_in_parts(
        self, requests: Sequence[Request], shares: Sequence[Sequence[Share]], generate: bool, done: Callable[[int], None] | None
    ) -> list[Reply]:
        """:meth:`run`, where some sets are read in parts or in several orientations. Their scores are those of their parts, and their texts are
        written behind the whole set as it is.
        """
        whole = replace(self, base=replace(self.base, shots=None, orientations=1))
        whole.limits = self.limits  # as memory has shown them to be
        scored = {index for index, parts in enumerate(shares) if len(parts) > 1 and requests[index][2]}
        both_at_once = {index for index in scored if generate and shares[index][0][0] == requests[index][0]}  # the first part is the whole set
        asked = [index for index in range(len(requests)) if generate or index not in scored]
        answers = [() if index in scored - both_at_once else requests[index][2] for index in range(len(requests))]
        replies = dict(zip(asked, whole.run([(*requests[i][:2], answers[i]) for i in asked], generate, done), strict=True))
        rest = {index: shares[index][1:] if index in both_at_once else shares[index] for index in sorted(scored)}
        of_parts = iter(whole.run([(*share, requests[i][2]) for i, own in rest.items() for share in own], generate=False))
        for index, own in rest.items():
            mean = combined([*([replies[index]] if index in both_at_once else []), *(next(of_parts) for _ in own)])
            replies[index] = replace(mean, text=replies[index].text) if generate else mean
        if done and not generate:
            done(len(scored))
        return [replies[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _answer(self, generate: bool, sets: Sequence[SetOfRequests], pack: int) -> dict[int, Reply]:
        """The replies about some support sets, ``pack`` questions at a time, by the indices of their requests."""
        behind = max(room(one, pack, self.max_new_tokens if generate else 0) for one in sets)
        prefilled = self.prefill([one.support for one in sets], behind)
        answered = self._ask_encoded(prefilled, [one.questions for one in sets], generate, pack)
        return {index: reply for one, own in zip(sets, answered, strict=True) for index, reply in zip(one.members, own, strict=True)}

    @torch.inference_mode()
    def _ask_encoded(self, prefilled: Prefilled, questions: Sequence[Sequence[EncodedQuestion]], generate: bool, pack: int) -> list[list[Reply]]:
        """Replies to the questions about each support set, ``pack`` at a time."""
        replies: list[list[Reply]] = [[] for _ in questions]
        for start in range(0, max(map(len, questions)), pack):
            answered = self._ask_together(prefilled, [own[start : start + pack] for own in questions], generate)
            for all_of_set, now in zip(replies, answered, strict=True):
                all_of_set += now
        return replies

    def _ask_together(self, prefilled: Prefilled, packs: Sequence[Sequence[EncodedQuestion]], generate: bool) -> list[list[Reply]]:
        """Replies to up to ``pack`` questions behind each support set.

        One forward pass reads the questions and the answers to score. Each generated token needs one more.
        """
        rows = [Row.of(questions) for questions in packs]
        longest = max(support + row.longest for support, row in zip(prefilled.longest, rows, strict=True))
        if longest + self.max_new_tokens > self.encoder.context:
            raise EpisodeError(f"support set and query are {longest} tokens, the context is {self.encoder.context}: show fewer photos.")
        length = max(len(row.ids) for row in rows)
        segment_ST = self._padded([row.segment for row in rows], length, PADDING)
        new_tokens = self.max_new_tokens * max(len(row.questions) for row in rows) if generate else 0
        with prefilled.room_for(length + new_tokens):
            turns = [question.turn for questions in packs for question in questions]
            logits_NV, index_of = self._read_rows(prefilled, rows, segment_ST, turns)
            scores = self._scores(logits_NV, index_of, rows)
            texts = [["" for _ in row.questions] for row in rows]
            if new_tokens:
                likeliest_N = logits_NV.argmax(-1).tolist()
                first = [[likeliest_N[index_of[number, question.last]] for question in row.questions] for number, row in enumerate(rows)]
                texts = self._generate_greedily(prefilled, rows, segment_ST, first)
        tokens = [[tuple(len(answer.ids) for answer in question.answers) for question in row.questions] for row in rows]
        return [[Reply(*parts) for parts in zip(*own, strict=True)] for own in zip(texts, scores, tokens, strict=True)]

    def _encoded(self, turn: Turn, answers: Sequence[str], first: bool, ended: bool = True) -> EncodedQuestion:
        """A question and its answers as tokens. first: no support set stands before it. ended: as of :class:`Question`."""
        prompt, answer_ids = self.encoder.question(turn, answers, first)
        answer_ids = answer_ids if ended else without_ends(answer_ids)
        positions, next_position = self.encoder.positions(prompt)
        encoded = tuple((ids, self.encoder.positions(ids[:-1], next_position)[0]) for ids in answer_ids)
        return EncodedQuestion(turn, prompt, positions, next_position, encoded)

    def _read_rows(
        self, prefilled: Prefilled, rows: Sequence[Row], segment_ST: torch.Tensor, turns: Sequence[Turn]
    ) -> tuple[torch.Tensor, Mapping[Place, int]]:
        """Read the rows behind their support sets. Returns logits [N, V], and which of the N belongs to a place."""
        length = segment_ST.shape[1]
        parent_ST = self._padded([row.parent for row in rows], length, PADDING)
        related_STT = (segment_ST[:, :, None] == segment_ST[:, None, :]) | (parent_ST[:, :, None] == segment_ST[:, None, :])
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        visible_STT = related_STT & (segment_ST >= 0)[:, None] & causal_TT
        # Padding attends to itself: a softmax over nothing would give NaNs.
        visible_STT |= torch.eye(length, dtype=torch.bool, device=self.device)
        support_STP = prefilled.mask.bool()[:, None, :].expand(-1, length, -1)
        needed_ST = torch.zeros(len(rows), length, dtype=torch.bool, device=self.device)
        for number, row in enumerate(rows):
            for place in row.places_to_read():
                needed_ST[number, place] = True
        logits = self._forward(
            self._padded([row.ids for row in rows], length, self.encoder.pad),
            torch.cat([support_STP, visible_STT], 2)[:, None],
            prefilled.next_position[:, None] + position_ids([row.position for row in rows], length).to(self.device),
            prefilled.cache,
            turns,
            logits_at=needed_ST,
        )
        logits_NV = logits.reshape(int(needed_ST.sum()), -1)
        return logits_NV, {(number, place): index for index, (number, place) in enumerate(needed_ST.nonzero().tolist())}

    def _scores(self, logits_NV: torch.Tensor, index_of: Mapping[Place, int], rows: Sequence[Row]) -> list[list[tuple[float, ...]]]:
        """The log-likelihoods of each question's answers, by row and question.

        Each is a sum over the answer's tokens.
        """
        answers = [(number, answer) for number, row in enumerate(rows) for question in row.questions for answer in question.answers]
        sums: list[float] = []
        if answers:
            index = torch.tensor([index_of[number, place] for number, answer in answers for place in answer.predicted_at], device=self.device)
            token = torch.tensor([token for _, answer in answers for token in answer.ids], device=self.device)
            owner = torch.tensor([n for n, (_, answer) in enumerate(answers) for _ in answer.ids], device=self.device)
            log_likelihood = logits_NV.float().log_softmax(-1)[index, token]
            sums = torch.zeros(len(answers), device=self.device).index_add_(0, owner, log_likelihood).tolist()
        in_order = iter(sums)
        return [[tuple(next(in_order) for _ in question.answers) for question in row.questions] for row in rows]

    def _generate_greedily(self, prefilled: Prefilled, rows: Sequence[Row], segment_ST: torch.Tensor, first: list[list[int]]) -> list[list[str]]:
        """The text of the most likely tokens after each question, until its end token or ``max_new_tokens``.

        first: each question's first token, by row.
        """
        ids_SK = self._padded(first, max(map(len, first)), self.encoder.eos)
        steps = [ids_SK]
        finished_SK = ids_SK == self.encoder.eos
        read_tokens = self._token_reader(prefilled, rows, segment_ST)
        while not bool(finished_SK.all()) and len(steps) < self.max_new_tokens:
            ids_SK = read_tokens(ids_SK).argmax(-1).masked_fill(finished_SK, self.encoder.eos)
            finished_SK = finished_SK | (ids_SK == self.encoder.eos)
            steps.append(ids_SK)
        ids_SKG = torch.stack(steps, 2).tolist()
        return [[self._text(ids_SKG[number][k]) for k in range(len(row.questions))] for number, row in enumerate(rows)]

    def _text(self, ids: Ids) -> str:
        """Generated tokens up to the first end token, as text."""
        ids = ids[: ids.index(self.encoder.eos)] if self.encoder.eos in ids else ids
        return str(self.encoder.tokenizer.decode(ids, skip_special_tokens=True).strip())

    def _token_reader(self, prefilled: Prefilled, rows: Sequence[Row], segment_ST: torch.Tensor) -> ReadTokens:
        """A function that reads one more token after each question: ids [S, K] -> logits of the next tokens [S, K, V].

        A token attends to its support set, its question and the tokens that were generated for that question before.
        """
        width = max(len(row.questions) for row in rows)
        question_SK = self._padded([[question.segment for question in row.questions] for row in rows], width, NO_SEGMENT)
        next_position_SK = self._padded([[question.next_position for question in row.questions] for row in rows], width, 0)
        position = prefilled.next_position[:, None] + next_position_SK
        if self.encoder.grid is not None:
            position = position.expand(3, -1, -1)
        own_question_SKT = question_SK[:, :, None] == segment_ST[:, None, :]
        support_SKP = prefilled.mask.bool()[:, None, :].expand(-1, width, -1)
        own_token_SKK = torch.eye(width, dtype=torch.bool, device=self.device)[None].expand(len(rows), -1, -1)
        visible = torch.cat([support_SKP, own_question_SKT], 2)  # [S, K, P + T], and K more with each token

        def read_tokens(ids_SK: torch.Tensor) -> torch.Tensor:
            nonlocal visible, position
            visible = torch.cat([visible, own_token_SKK], 2)
            logits_SKV = self._forward(ids_SK, visible[:, None], position, prefilled.cache, (), logits_at=0)
            position = position + 1
            return logits_SKV

        return read_tokens

    def _padded(self, rows: Sequence[Sequence[int]], length: int, fill: int) -> torch.Tensor:
        """[S, length], padded on the right."""
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.long, device=self.device)

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        turns: Sequence[Turn],
        logits_at: int | torch.Tensor,
    ) -> torch.Tensor:
        """Read ``ids`` behind the content of the cache. turns: those whose pictures stand in ``ids``.

        logits_at: where logits are computed: a mask, the last so many tokens, or 0 for all of them.
        """
        pictures = self.encoder.pictures(turns)
        images = {"mm_encoder_outputs": self.vision.projected_features(pictures)} if pictures else {}
        outputs = self.base.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=logits_at, **images
        )
        logits: torch.Tensor = outputs.logits
        return logits
