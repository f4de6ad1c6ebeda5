"""lcl-adapter as a model of lmms-eval: a base with its adapter, one of both alone, on this machine.

    lmms-eval --model lcl-adapter --model_args run=runs/pocket --tasks lcl --include_path tasks/

Messages become turns, so a support set that several questions share is read once (``lcl_adapter.answering.predict``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from lmms_eval.api.model import lmms

from lcl_adapter.answering.predict import Predictor, Request
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import RequestError
from lcl_lmms_eval.messages import turns_of

NEW_TOKENS = 64  # where a task does not say how long an answer may be


class LclAdapter(lmms):
    """Greedy answers of a base, with its adapter or without it.

    run: a trained adapter's folder, or a shipped one's name; None for ``base`` alone.
    base: ``pocket``, ``photo`` or a folder; with ``run``, where the adapter's base is.
    adapter: false answers with the run's base, without its adapter.
    answer: "generated" is the greedy text; "likeliest" is the most likely of the labels, where the task has them, as the
    scored labels of ``lcl-adapter eval``.
    precision, tower, attn_implementation: as of the recipe. device, batch_size: lmms-eval's own options.
    """

    is_simple = False

    def __init__(
        self,
        run: str | None = None,
        base: str | None = None,
        adapter: bool = True,
        answer: str = "generated",
        precision: Any = None,
        tower: str | None = None,
        attn_implementation: Any = None,
        device: str | None = None,
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if answer not in {"generated", "likeliest"}:
            raise RequestError(f"answer={answer}: it is generated or likeliest.")
        if run is None and base is None:
            raise RequestError("give run=FOLDER, a trained adapter, or base=NAME, in --model_args.")
        device = device.partition(":")[0] if device else None
        ref = BaseRef(base, precision, device, tower=tower, attn_implementation=attn_implementation)
        loaded = load_base(ref) if run is None else load_adapter(run, ref)[0]
        self.predictor = Predictor(loaded, batch_size=max(1, int(batch_size)) if str(batch_size).isdigit() else 32)
        self.bare = run is not None and not adapter
        self.likeliest = answer == "likeliest"

    @property
    def device(self) -> Any:
        return self.predictor.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        asked: list[Request] = []
        lengths: list[int] = []
        stops: list[list[str]] = []
        pictures: dict[str, Picture] = {}
        for request in requests:
            _, doc_to_messages, options, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            *support, query = turns_of(doc_to_messages(doc), pictures)
            answers = tuple(doc.get("answers") or ()) if self.likeliest else ()
            asked.append((tuple(support), query, answers))
            _check_greedy(options, task)
            lengths.append(int(options.get("max_new_tokens") or NEW_TOKENS))
            stops.append(_stops(options.get("until")))
        texts = [""] * len(asked)
        with self.predictor.base.without_adapter() if self.bare else nullcontext():
            for length, scored in sorted({(n, bool(request[2])) for n, request in zip(lengths, asked, strict=True)}):
                own = [i for i, request in enumerate(asked) if (lengths[i], bool(request[2])) == (length, scored)]
                replies = self.predictor.run([asked[i] for i in own], generate=not scored, new_tokens=length)
                for i, reply in zip(own, replies, strict=True):
                    texts[i] = asked[i][2][reply.best] if scored else _cut(reply.text, stops[i])
        return texts

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("lcl-adapter answers tasks of one round.")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lmms-eval asks chat models for texts alone; answer=likeliest scores a task's labels.")


def _check_greedy(options: dict[str, Any], task: str) -> None:
    if (options.get("do_sample") and (options.get("temperature") or 0) > 0) or (options.get("num_beams") or 1) > 1:
        raise RequestError(f"{task}: lcl-adapter answers greedily; give --gen_kwargs do_sample=False,temperature=0,num_beams=1.")


def _stops(until: Any) -> list[str]:
    return [stop for stop in ([until] if isinstance(until, str) else until or []) if stop]


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop texts."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
