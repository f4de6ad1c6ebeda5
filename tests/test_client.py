"""The client: messages, scores from listed tokens, faults of servers; against this project's own server and `transformers serve`."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lcl_adapter.answering.ask import ask_endpoint, ask_model
from lcl_adapter.answering.client import Endpoint, RemotePredictor, judge
from lcl_adapter.answering.client.decisions import one_message
from lcl_adapter.answering.client.messages import image_of, to_messages
from lcl_adapter.answering.client.scores import TokenScore, find_answer, log_likelihoods
from lcl_adapter.answering.predict import Predictor
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.cli import commands, main
from lcl_adapter.data.conversations import WORDINGS, Turn, support_turns
from lcl_adapter.data.sources import Picture, read_image
from lcl_adapter.errors import ConflictError, EndpointError, MissingError, RequestError
from lcl_adapter.evaluate import ServedModels, build_cells, evaluate
from tests.conftest import paint
from tests.live import serving, transformers_serving, with_template
from tests.test_evaluate import with_suites
from tests.test_merge import adapter_on


def decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


# Messages


@pytest.mark.parametrize(
    "name", ["plain.png", "plain.jpg", "plain.webp", "turned.jpg", "clear.png", "grey.png", "16bit.png", "palette.gif", "still.bmp"]
)
def test_a_server_gets_the_pixels_that_training_reads(tmp_path: Path, name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    path = tmp_path / name
    match path.stem:
        case "turned":
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(path, exif=exif)
        case "clear":
            image.putalpha(Image.fromarray(pixels[..., 0]))
            image.save(path)
        case "grey":
            image.convert("L").save(path)
        case "16bit":
            Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(path)
        case _:
            image.save(path)
    picture = Picture(path)
    sent = image_of(picture)
    assert decoded(sent).mode == "RGB"
    assert np.array_equal(np.asarray(decoded(sent)), np.asarray(read_image(picture)))
    if path.stem == "plain":
        assert base64.b64decode(sent.partition(",")[2]) == path.read_bytes()  # unchanged, so that a photo does not grow


def test_views_tiles_rotations_and_crops_are_sent_as_read(tmp_path: Path) -> None:
    path = paint(tmp_path / "a.png", (90, 120, 30))
    for picture in (Picture(path, view=2), Picture(path, turned=1), Picture(path, tile=(2, 2, 3)), Picture(path, crop=(4, 5, 20, 30))):
        assert np.array_equal(np.asarray(decoded(image_of(picture))), np.asarray(read_image(picture)))


def test_an_image_comes_before_its_text_or_at_its_placeholder(tmp_path: Path) -> None:
    one, two = (Picture(paint(tmp_path / f"{n}.png", (60 * n, 90, 30), seed=n)) for n in range(2))
    plain, answer, several = to_messages(
        [Turn("user", "What is this?", one), Turn("assistant", "good"), Turn("user", "Is <image> like <image>?", one, further=(two,))]
    )
    assert [part["type"] for part in plain["content"]] == ["image_url", "text"]
    assert answer == {"role": "assistant", "content": "good"}
    assert [part.get("text") for part in several["content"]] == ["Is", None, "like", None, "?"]
    assert several["content"][3]["image_url"]["url"] == image_of(two)


# Scores


def walk(model: dict[str, dict[str, float]], end: str, cut: int) -> tuple[str, list[TokenScore]]:
    """The greedy answer by a table of next tokens, in a server's form: with the ``cut`` likeliest at each place."""
    text, tokens = "", []
    while True:
        ranked = sorted(model[text].items(), key=lambda item: -item[1])
        top = tuple((token, math.log(p)) for token, p in ranked[:cut])
        best, chance = ranked[0]
        tokens.append(TokenScore(best, math.log(chance), top))
        if best == end:
            return text, tokens
        text += best


def test_scores_are_exact_if_labels_differ_in_the_first_token() -> None:
    model = {"": {"good": 0.6, "scr": 0.3, "x": 0.1}, "good": {"</s>": 1.0 - 1e-9, " one": 1e-9}}
    text, tokens = walk(model, "</s>", 3)
    scores = log_likelihoods(["good", "scratched", "dented"], text, tokens)
    assert scores[0] == pytest.approx(math.log(0.6), abs=1e-6)
    assert scores[1] == pytest.approx(math.log(0.3), abs=1e-6)
    assert scores[2] <= math.log(1e-9) + 1e-6  # no listed token begins it, and no probability is left


def test_a_label_that_begins_another_differs_at_its_end() -> None:
    model = {"": {"good": 0.9, "bad": 0.1}, "good": {" one": 0.8, "</s>": 0.2}, "good one": {"</s>": 1.0}}
    text, tokens = walk(model, "</s>", 2)
    assert log_likelihoods(["good", "good one", "bad"], text, tokens) == pytest.approx([math.log(0.18), math.log(0.72), math.log(0.1)])


def test_labels_with_the_same_alternative_share_its_probability() -> None:
    model = {"": {"ok": 0.6, "sc": 0.4}, "ok": {"</s>": 1.0}}
    text, tokens = walk(model, "</s>", 2)
    assert log_likelihoods(["ok", "scratch", "scuff"], text, tokens) == pytest.approx([math.log(0.6), math.log(0.2), math.log(0.2)])


@pytest.mark.parametrize("spaced", [True, False])
def test_spaces_of_tokens_make_no_difference(spaced: bool) -> None:
    gap = " " if spaced else ""
    tokens = [
        TokenScore(f"{gap}there", -0.1),
        TokenScore(f"{gap}is", -0.1, ((f"{gap}was", -3.0),)),
        TokenScore(f"{gap}good", -0.2, ((f"{gap}bad", -2.0),)),
        TokenScore("</s>", 0),
    ]
    assert log_likelihoods(["there is good", "there is bad"], "there is good", tokens) == pytest.approx([-0.4, -2.2])


@given(
    st.lists(st.text("ab ", min_size=1, max_size=5).map(str.strip).filter(bool), min_size=2, max_size=4, unique=True),
    st.integers(1, 20),
    st.randoms(),
)
def test_the_label_in_the_text_is_the_likeliest(labels: list[str], cut: int, random: Any) -> None:
    """For a model that gives each label a probability and generates the likeliest, with one letter in each token."""
    labels = list({label.replace(" ", ""): label for label in labels}.values())
    best = labels[random.randrange(len(labels))]
    prefixes = {best[:n] for n in range(len(best) + 1)}
    model: dict[str, dict[str, float]] = {}
    for prefix in prefixes:
        following = {label[len(prefix)] if len(label) > len(prefix) else "</s>" for label in labels if label.startswith(prefix)}
        wanted = best[len(prefix)] if len(best) > len(prefix) else "</s>"
        others = following - {wanted}
        model[prefix] = {wanted: 1.0 - 0.1 * len(others), **dict.fromkeys(others, 0.1)} if others else {wanted: 1.0}
    text, tokens = walk(model, "</s>", cut)
    assert text == best
    scores = log_likelihoods(labels, text, tokens)
    assert max(range(len(labels)), key=scores.__getitem__) == labels.index(best) or len({*scores}) == 1


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("Good.", 0),
        ("it is scratched", 1),
        ("a good one, not scratched", None),
        ("goodness", None),
        ("", None),
        ("not good", 2),
        ("a not good one", 2),
    ],
)
def test_without_tokens_the_text_decides(text: str, index: int | None) -> None:
    labels = ["good", "scratched", "not good"]
    assert find_answer(labels, text) == index
    scores = log_likelihoods(labels, text, None)
    assert (scores[index] == max(scores) > min(scores)) if index is not None else len({*scores}) == 1


# Faults of servers


class Fake(BaseHTTPRequestHandler):
    """Sends the responses in ``answers`` one after the other, then the last one again and again."""

    answers: ClassVar[list[tuple[int, dict[str, str], Any]]] = []
    requests: ClassVar[list[tuple[str, dict[str, str], Any]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).requests.append((self.path, dict(self.headers), json.loads(body) if body else None))
        status, headers, answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_DELETE = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def closed_endpoints(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every endpoint of a test is closed at its end: a connection that is collected open is a warning of some later test."""
    opened, made = list[Endpoint](), Endpoint.__init__

    def noted(self: Endpoint, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        opened.append(self)

    monkeypatch.setattr(Endpoint, "__init__", noted)
    yield
    for endpoint in opened:
        endpoint.close()


@pytest.fixture
def fake() -> Iterator[tuple[str, type[Fake]]]:
    kind = type("Own", (Fake,), {"answers": [], "requests": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", kind
    running.shutdown()
    running.server_close()
    thread.join(10)


def completion(text: str, logprobs: Any = None) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "logprobs": logprobs, "finish_reason": "stop"}]}


def test_a_busy_server_gets_the_request_again(fake: tuple[str, type[Fake]]) -> None:
    url, kind = fake
    kind.answers = [(429, {"Retry-After": "1"}, {"error": {"message": "full"}}), (503, {}, b"starting"), (200, {}, completion(" good "))]
    assert Endpoint(url, patience=0.01).chat("m", [], 4).text == "good"
    assert len(kind.requests) == 3


def test_a_server_that_stays_busy_is_an_error(fake: tuple[str, type[Fake]]) -> None:
    url, kind = fake
    kind.answers = [(503, {}, b"starting")]
    with pytest.raises(EndpointError, match="answers 503: starting"):
        Endpoint(url, patience=0.001).chat("m", [], 4)


def test_logprobs_are_left_out_where_a_server_refuses_them(fake: tuple[str, type[Fake]]) -> None:
    url, kind = fake
    kind.answers = [(422, {}, {"detail": "unexpected field: top_logprobs"}), (200, {}, completion("good"))]
    endpoint = Endpoint(url, patience=0.01)
    assert endpoint.chat("m", [], 4, scored=True).tokens is None
    assert endpoint.chat("m", [], 4, scored=True).text == "good"
    assert [body.get("logprobs") for _, _, body in kind.requests] == [True, None, None]


@pytest.mark.parametrize(
    ("status", "answer", "error", "message"),
    [
        (401, {"error": {"message": "no key"}}, EndpointError, "LCL_API_KEY"),
        (404, {"error": {"message": "no model 'm'"}}, MissingError, "no model"),
        (409, {"error": {"message": "another wrote"}}, ConflictError, "another"),
        (400, {"message": "too long"}, RequestError, "too long"),
        (413, b"<html>nginx", RequestError, "nginx"),
        (500, {"error": "boom"}, EndpointError, "500: boom"),
        (200, b"<html>a page", EndpointError, "not JSON"),
        (200, {"choices": []}, EndpointError, "not a chat completion"),
        (200, ["a list"], EndpointError, "not a chat completion"),
    ],
)
def test_a_servers_message_is_in_the_error(fake: tuple[str, type[Fake]], status: int, answer: Any, error: type[Exception], message: str) -> None:
    url, kind = fake
    kind.answers = [(status, {}, answer)]
    with pytest.raises(error, match=message):
        Endpoint(url, patience=0.001).chat("m", [], 4)


def test_no_server_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EndpointError, match="cannot be reached"):
        Endpoint(f"http://127.0.0.1:{port}", patience=0.001).models()
    with pytest.raises(EndpointError, match="no server's address"):
        Endpoint("127.0.0.1:8000")


def test_a_server_that_does_not_answer_in_time(fake: tuple[str, type[Fake]]) -> None:
    url, kind = fake
    kind.do_POST = lambda self: time.sleep(1)  # type: ignore[method-assign]
    with pytest.raises(EndpointError, match="no answer within 0 s"):
        Endpoint(url, timeout=0.1).chat("m", [], 4)


def test_the_key_is_sent_and_no_proxy_is_used(fake: tuple[str, type[Fake]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, kind = fake
    kind.answers = [(200, {}, {"data": [{"id": "a"}, {"id": "b"}]})]
    monkeypatch.setenv("LCL_API_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    endpoint = Endpoint(f"{url}/v1/")
    assert endpoint.models() == ["a", "b"]
    assert kind.requests[0][1]["Authorization"] == "Bearer secret"
    with pytest.raises(MissingError, match="choose one with --model"):
        endpoint.model(None)
    with pytest.raises(MissingError, match="no model 'c'"):
        endpoint.model("c")


def test_an_error_cancels_the_remaining_requests(fake: tuple[str, type[Fake]], tmp_path: Path) -> None:
    url, kind = fake
    kind.answers = [(400, {}, {"error": {"message": "the context is full"}})]
    query = Turn("user", "What is this?", Picture(paint(tmp_path / "q.png", (1, 2, 3))))
    with pytest.raises(RequestError, match="context is full"):
        RemotePredictor(Endpoint(url, patience=0.001), "m", workers=2).run([((), query, ())] * 200)
    assert len(kind.requests) < 100


# This project's own server


@pytest.fixture(scope="module")
def run_folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on(tiny_folder("pocket"), tmp_path_factory.mktemp("client") / "parts")


@pytest.fixture(scope="module")
def own(tiny_folder: Callable[[str], Path], run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tiny_folder("pocket"), tmp_path_factory.mktemp("client-store") / "store", parts=run_folder) as url:
        yield url


def test_a_served_model_gives_the_same_texts(own: str, pocket_tiny: Path, tmp_path: Path) -> None:
    made = with_suites(pocket_tiny, tmp_path)
    cell = next(cell for cell in build_cells(made, limit=8) if cell.shots == 2)
    requests = [(c.support, c.query, c.answers) for c in cell.cases]
    predictor = Predictor(load_base(BaseRef(str(pocket_tiny), device="cpu")), max_new_tokens=6)
    offline = predictor.run(requests)
    served = RemotePredictor(Endpoint(own), "base", workers=4).run(requests, new_tokens=6)
    assert [r.text for r in served] == [r.text for r in offline]


def test_eval_over_an_endpoint(own: str, run_folder: Path, pocket_tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "parts"
    run.mkdir()
    for file in run_folder.iterdir():
        (run / file.name).write_bytes(file.read_bytes()) if file.is_file() else None
    (run / "recipe.yaml").write_text(with_suites(pocket_tiny, tmp_path).model_dump_json(exclude_none=True), encoding="utf-8")
    local = evaluate(run, suites=("vqa", "2way"), limit=6)
    report = evaluate(run, suites=("vqa", "2way"), limit=6, served=ServedModels(own))
    assert report["served"] == [own, "base", "parts"]
    assert report["folder"] == str(run / "served")
    by_name = {row["name"]: row for row in report["suites"]}
    offline = {row["name"]: row for row in local["suites"]}
    assert by_name["vqa"]["adapter"] == offline["vqa"]["adapter"]
    for name in [name for name in by_name if name.startswith("2way")]:  # labels by their exact probabilities
        for model in ("base", "adapter"):
            assert by_name[name][model]["value"] == offline[name][model]["value"], (name, model)
    assert report["notes"] == [f"label scores are exact probabilities, from {own}/v1/systemone"]
    assert by_name["2way-2shot-easy"]["baseline"] is None
    assert json.loads((run / "served" / "report.json").read_text())["suites"] == report["suites"]
    with pytest.raises(MissingError, match="no model 'lcl'"):
        evaluate(run, suites=("vqa",), limit=6, served=ServedModels(own, adapter="lcl"))
    page = commands.evaluate(run, suites=("2way",), limit=6, served=ServedModels(own))
    assert (Path(page["folder"]) / "report.html").exists()


def test_ask_over_an_endpoint(own: str, photos: Path) -> None:
    query = photos / "good" / "3.png"
    result = CliRunner().invoke(
        main, ["ask", str(photos), str(query), "--shots", "2", "--endpoint", own, "--model", "parts", "--wording", "short", "--json"]
    )
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)["answers"][0]
    assert set(answer["scores"]) == {"good", "scratched", "dented"}
    assert sum(answer["scores"].values()) == pytest.approx(1)


def test_ask_by_a_stored_set(own: str, photos: Path, tmp_path: Path) -> None:
    examples = [
        {"label": folder.name, "image": image_of(Picture(file))} for folder in sorted(photos.iterdir()) for file in sorted(folder.iterdir())[:2]
    ]
    httpx2.put(f"{own}/v1/support-sets/three", json={"examples": examples}).raise_for_status()
    with Endpoint(own) as endpoint:
        assert [stored.name for stored in endpoint.sets()] == ["three"]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<html>")
    result = CliRunner().invoke(main, ["ask", "three", str(photos / "good/3.png"), str(broken), "--stored", "--endpoint", own, "--json"])
    assert result.exit_code == 1
    good, bad = json.loads(result.stdout)["answers"]
    assert set(good["scores"]) == {"good", "scratched", "dented"}
    assert "not an image" in bad["error"]
    unnamed = CliRunner().invoke(main, ["ask", "my set", str(photos / "good/3.png"), "--stored", "--endpoint", own])
    assert unnamed.exit_code == 2
    assert "support_set" in unnamed.output
    missing = CliRunner().invoke(main, ["ask", "four", str(photos / "good/3.png"), "--stored", "--endpoint", own])
    assert missing.exit_code == 2
    assert "four" in missing.output


def test_results_of_a_server_are_written_too(own: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several requests; a broken photo among them is named in the table."""
    monkeypatch.setattr("lcl_adapter.answering.ask.BLOCK", 2)
    examples = [{"label": folder.name, "image": image_of(Picture(next(iter(sorted(folder.iterdir())))))} for folder in sorted(photos.iterdir())]
    httpx2.put(f"{own}/v1/support-sets/written", json={"examples": examples}).raise_for_status()
    new = tmp_path / "new"
    for number in range(4):
        paint(new / f"{number}.png", (60 * number, 90, 30), seed=number)
    (new / "broken.png").write_bytes(b"<html>")
    for support, options in (("written", ["--stored"]), (photos, ["--shots", "1", "--wording", "short"])):
        out = tmp_path / f"judged-{len(options)}"
        result = CliRunner().invoke(
            main, ["ask", str(support), str(new), "--endpoint", own, "--model", "parts", *options, "--out", str(out), "--json"]
        )
        assert result.exit_code == 1, result.output
        answers = json.loads(result.stdout)["answers"]
        assert [Path(answer["query"]).name for answer in answers] == ["0.png", "1.png", "2.png", "3.png", "broken.png"]
        assert ["error" in answer for answer in answers] == [False] * 4 + [True]
        page = (out / "index.html").read_text(encoding="utf-8")
        unsure = sum(answer.get("unsure", False) for answer in answers)
        # The labelled photos, the new ones (an unsure one twice), and beside each the most alike photo if the server has the set
        assert page.count("<img") == 3 + (4 + unsure) * (2 if "--stored" in options else 1)
        assert "data:image/svg" not in page, "a grey square is a picture that was not there"
        assert "not an image" in page
    changed = httpx2.put(f"{own}/v1/support-sets/written", json={"examples": examples[:2]}).raise_for_status().json()
    with Endpoint(own) as endpoint:
        first = judge(endpoint, "written", [Picture(new / "0.png")], version=changed["version"] - 1)
        assert len(first.results[0].probabilities) == 3
        assert len(endpoint.read_set("written", version=first.version).examples) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x"], "--model needs --endpoint"),
        (["--endpoint", "http://h", "--compare"], "--compare cannot be used"),
        (["--stored"], "--stored needs --endpoint"),
        (["--endpoint", "http://h", "--adapter", "runs/x"], "--adapter: with --endpoint"),
        (["--endpoint", "http://h", "--stored", "--shots", "2"], "--shots"),
    ],
)
def test_options_that_exclude_each_other(photos: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["ask", str(photos), str(photos / "good/3.png"), *arguments])
    assert result.exit_code == 2
    assert message in result.output


# transformers serve


@pytest.fixture(scope="module")
def theirs(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """`transformers serve` on a tiny LLaVA-1.5, and the base's folder."""
    folder = tmp_path_factory.mktemp("transformers")
    base = with_template(tiny_folder("llava-1.5"), folder / "base")
    with transformers_serving(base) as url:
        yield url, base


@pytest.fixture
def square_photos(tmp_path: Path) -> Path:
    """Photos are square, because a bare processor pads others differently."""
    for number, name in enumerate(("good", "scratched")):
        for shot in range(2):
            paint(tmp_path / "square" / name / f"{shot}.png", (60 + 90 * number, 200 - 80 * shot, 70), 2 * number + shot, (32, 32))
    return tmp_path / "square"


def test_transformers_serve_gives_the_same_answer(theirs: tuple[str, Path], square_photos: Path) -> None:
    url, base = theirs
    served = ask_endpoint(square_photos, [square_photos / "good/1.png"], url, model=str(base), shots=1)
    offline = ask_model(square_photos, [square_photos / "good/1.png"], base=BaseRef(str(base)), shots=1)
    assert served.answers[0]["answer"] == offline.answers[0]["answer"]


# Exact probabilities, where the server has a route for them


def test_this_projects_server_gives_the_exact_scores(own: str, pocket_tiny: Path, tmp_path: Path) -> None:
    """Those of the offline predictor, for every kind of case, of few and of no labelled photos."""
    cells = build_cells(with_suites(pocket_tiny, tmp_path), limit=4)
    requests = [(c.support, c.query, c.answers) for cell in cells for c in cell.cases if c.answers]
    predictor = Predictor(load_base(BaseRef(str(pocket_tiny), device="cpu")), max_new_tokens=2)
    offline = predictor.run(requests)
    with Endpoint(own) as endpoint:
        served = RemotePredictor(endpoint, "base", workers=4).run(requests, new_tokens=2)
        assert endpoint.notes == [f"label scores are exact probabilities, from {own}/v1/systemone"]
        by_text = RemotePredictor(endpoint, "base", workers=4, scores="text").run(requests, new_tokens=2)
        assert len(endpoint.notes) == 1
    assert len(requests) > 10
    for one, other in zip(served, offline, strict=True):
        assert one.text == other.text
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)
    assert any(one.probabilities != pytest.approx(other.probabilities, abs=0.01) for one, other in zip(by_text, offline, strict=True))


def test_transformers_serve_gives_exact_scores_of_letters(theirs: tuple[str, Path], square_photos: Path) -> None:
    """Equal to the offline model's, asked the same way; a set of more photos than its route reads is scored by the text."""
    url, base = theirs
    query = square_photos / "good/1.png"
    served = ask_endpoint(square_photos, [query], url, model=str(base), shots=1)
    assert "exact probabilities" in served.result["notes"][-1]
    worded = WORDINGS["lcl"]
    shown = [(Picture(square_photos / name / "0.png"), name) for name in ("good", "scratched")]
    labels = [worded.answered(name) for name in ("good", "scratched")]
    text, instructions, assets = one_message(support_turns(shown, worded), Turn("user", worded.query, Picture(query)))
    assert text.count("Image ") == 2
    assert list(assets) == ["<photo-1>", "<photo-2>", "<photo-3>"]
    body = {"state": text, "questions": {"q": {"type": "choice", "instructions": instructions, "criteria": dict.fromkeys(labels)}}, "assets": assets}
    alone = httpx2.post(f"{url}/v1/systemone", json={"model": str(base), **body}, timeout=60).raise_for_status().json()["answers"]["q"]
    assert list(served.answers[0]["scores"].values()) == pytest.approx([alone["probabilities"][label] for label in labels], abs=1e-6)
    assert served.answers[0]["margin"] > 0
    more = ask_endpoint(square_photos, [query], url, model=str(base))
    assert "5 photos and 2 labels are read from the generated text" in more.result["notes"][-1]
    by_text = ask_endpoint(square_photos, [query], url, model=str(base), shots=1, scores="text")
    assert by_text.result["notes"] == served.result["notes"][:-1]


def decision(tokens: int, **probabilities: float) -> dict[str, Any]:
    return {"answers": {"label": {"type": "choice", "probabilities": probabilities}}, "usage": {"input_tokens": tokens, "output_tokens": 0}}


@pytest.mark.parametrize(
    ("responses", "note"),
    [
        ([(404, {}, {"detail": "Not Found"})], "has no /v1/systemone for this model"),
        ([(405, {}, {"detail": "Method Not Allowed"})], "has no /v1/systemone for this model"),
        ([(501, {}, {"error": {"message": "does not support LlavaForConditionalGeneration"}})], "LlavaForConditionalGeneration"),
        ([(200, {}, decision(20, good=0.5, bad=0.5))] * 2, "reads no photos"),
        ([(200, {}, ["a list"])], "not that of this route"),
    ],
    ids=["no route", "another method", "another model", "texts alone", "another server"],
)
def test_a_server_without_exact_scores_is_read_as_before(
    fake: tuple[str, type[Fake]], tmp_path: Path, responses: list[Any], note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As vLLM, whose route reads texts alone and answers 501 for most models."""
    url, kind = fake
    kind.answers = [(200, {}, {"data": [{"id": "m", "owned_by": "vllm"}]}), *responses, (200, {}, completion("bad"))]
    query = Turn("user", "What is this?", Picture(paint(tmp_path / "q.png", (1, 2, 3))))
    with Endpoint(url, patience=0.001) as endpoint:
        [first, second] = RemotePredictor(endpoint, "m", workers=1).run([((), query, ("good", "bad"))] * 2)
        assert first.best == second.best == 1
        assert len(endpoint.notes) == 1
        assert note in endpoint.notes[0]
    assert [path for path, _, _ in kind.requests][-2:] == ["/v1/chat/completions"] * 2, "the route is tried once"
    assert note in capsys.readouterr().err.replace("\n", " ")


def test_probabilities_of_a_server_that_reads_photos(fake: tuple[str, type[Fake]], tmp_path: Path) -> None:
    url, kind = fake
    probed = [(200, {}, decision(600, a=1)), (200, {}, decision(20, a=1))]
    answered = [(200, {}, decision(700, good=0.25, bad=0.75)), (200, {}, completion("good")), (200, {}, decision(700, good=1.0, bad=0.0))]
    kind.answers = [(200, {}, {"data": [{"id": "m"}]}), *probed, *answered, (200, {}, completion("bad")), (200, {}, decision(700, good=1.0))]
    query = Turn("user", "What is this?", Picture(paint(tmp_path / "q.png", (1, 2, 3))))
    with Endpoint(url, patience=0.001) as endpoint:
        remote = RemotePredictor(endpoint, "m", workers=1)
        [first, second] = remote.run([((), query, ("good", "bad"))] * 2)
        assert first.probabilities == pytest.approx((0.25, 0.75))
        assert (first.text, second.text) == ("good", "bad")
        assert second.probabilities == pytest.approx((1.0, 0.0))
        with pytest.raises(EndpointError, match="no probability for each label"):
            remote.run([((), query, ("good", "bad"))])
