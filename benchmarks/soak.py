"""Five minutes of 32 clients with faults mixed in: how many answers are wrong, and whether memory grows.

    python -m benchmarks.soak runs/quickstart [SECONDS] [--small] [--store]        # an adapter on the shipped base
    python -m benchmarks.soak runs/quickstart --kills 20 [--small] [--store]       # the server is killed 20 times under load
    python -m benchmarks.soak runs/quickstart --strangers [SECONDS] [--small] [--store]    # honest clients alone, then beside strangers

With --strangers, a few honest clients use the server for two fifths of the time. Then they go on as before, while other
clients send what costs a server most (benchmarks/strangers.py): expensive pictures and bodies, half-sent requests, and
answers that they do not read. The slowest honest request is compared with twice the usual 99th percentile of its kind.

With --kills all servers use the same store. Each client draws its next request at random. Most classify photos of a
known set, and the results are compared with the offline engine. The others send a broken image, a body that is too
large, a wrong key, an unknown set or broken JSON, write a set, chat, or disconnect before the answer.
"""

from __future__ import annotations

import argparse
import base64
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx2
import numpy as np
import torch

from benchmarks.common import THREADS, finish, options_of, parser
from benchmarks.serve import BIN, CLIENTS, running
from lcl_adapter.answering.judgement import TowerEvidence, Weighing, read_weighing
from lcl_adapter.answering.predict import Predictor, Question
from lcl_adapter.base.adapter import load_adapter
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.data.conversations import Turn, support_turns, wording_of
from lcl_adapter.data.sources.images import read_bytes
from lcl_adapter.data.sources.pocket import read_pocket
from lcl_adapter.recipe import load

SECONDS = 300.0
SETS, QUERIES, SHOTS = 12, 4, 4
KEYS = {"a": "a-key-of-the-soak-0123", "b": "b-key-of-the-soak-4567"}
ROOT = Path(__file__).parent.parent
STRANGER, OPS = "s-key-of-a-stranger-89", "ops-key-of-the-soak-10"
ADMIN = {"Authorization": f"Bearer {OPS}"}
HONEST = {"classify": 0.85, "chat": 0.1, "put": 0.05}  # beside strangers
HONEST_CLIENTS, HONEST_PAUSE = 8, 0.3  # a server that is in use, and not full
WARM_UP = 10.0  # seconds, in which every set is prefilled and calibrated
SLOWEST = 2.0  # times the usual 99th percentile of its kind that an honest request may need beside strangers
CACHE_MB = 6  # for prefilled sets: about a third of them fit, so that sets are evicted and prefilled again
CLOSE = 1e-3  # allowed difference of a probability: in a batch, sums are computed in another order
EXPECTED = {  # HTTP statuses; 0 is no answer, because the client disconnected or the server stopped reading
    "classify": {200, 429}, "broken": {200, 429}, "large": {0, 413}, "key": {401}, "unknown": {404}, "json": {400}, "put": {200, 429},
    "chat": {200, 429}, "cancel": {0, 200, 429},
}  # fmt: skip
WEIGHTS = {"classify": 0.6, "broken": 0.07, "large": 0.01, "key": 0.05, "unknown": 0.05, "json": 0.05, "put": 0.04, "chat": 0.06, "cancel": 0.07}


def url(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode()


class Soak:
    """The support sets and their expected answers, the clients, and what they counted."""

    def __init__(self, run: Path, small: bool) -> None:
        torch.set_num_threads(THREADS)
        base, manifest = load_adapter(run, BaseRef(device="cpu"))
        self.weights = sum(p.numel() * p.element_size() for name, p in base.llava.named_parameters() if "lora" not in name)
        self.wording, predictor = wording_of(load(run / "recipe.yaml")), Predictor(base)
        weighing, space = read_weighing(run, manifest) or (Weighing(), None)
        tower = TowerEvidence(predictor.vision, space)
        rng, pool = np.random.default_rng(0), read_pocket("held_out", min_pictures=SHOTS + QUERIES // 2)
        self.sets: list[dict[str, Any]] = []
        for _ in range(2 if small else SETS):
            classes = [pool.classes[i] for i in rng.choice(len(pool.classes), 2, replace=False)]
            shown = [(picture, c.name) for c in classes for picture in c.pictures[:SHOTS]]
            queries = [picture for c in classes for picture in c.pictures[SHOTS : SHOTS + QUERIES // 2]]
            answers = tuple(self.wording.answered(c.name) for c in classes)
            ready = predictor.prefill([support_turns(shown, self.wording)])
            replies = predictor.ask(ready, [Question(0, Turn("user", self.wording.query, q), answers) for q in queries], generate=False)
            examples = [{"label": label, "image": url(read_bytes(picture))} for picture, label in shown]
            # As the server judges: by model and tower, where the adapter has weights for both
            evidence = tower.of(tuple(shown), queries, tuple(c.name for c in classes))
            judged = [weighing.scores(reply.log_likelihoods, own) or reply.log_likelihoods for reply, own in zip(replies, evidence, strict=True)]
            self.sets.append({"examples": examples, "queries": [url(read_bytes(q)) for q in queries], "scores": judged})
        self.weights_of = dict(WEIGHTS)
        self.clients = 4 if small else CLIENTS
        self.pause = 0.0  # seconds between two requests of a client, on average
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.seconds: dict[str, list[float]] = defaultdict(list)  # that answered requests needed, by kind
        self.wrong: list[str] = []
        self.compared = 0
        self.stored: dict[str, int] = {}
        self.lock = threading.Lock()

    def counts(self, unexpected: int, lost: int) -> dict[str, int]:
        """The figures of both kinds of run."""
        return {"compared": self.compared, "wrong": len(self.wrong), "unexpected": unexpected, "acknowledged": len(self.stored), "lost": lost}

    def client(self, number: int, address: str, until: float) -> None:
        """Send random requests until ``until``, a time of ``time.monotonic``."""
        rng = np.random.default_rng(number)
        with httpx2.Client(base_url=address, timeout=60) as http:
            while time.monotonic() < until:
                what = str(rng.choice(list(self.weights_of), p=list(self.weights_of.values())))
                name = "ab"[int(rng.integers(2))]
                headers = {"Authorization": f"Bearer {KEYS[name]}"}
                began = time.monotonic()
                try:
                    status = self.act(what, http, headers, name, rng)
                except httpx2.TransportError:
                    status = 0
                with self.lock:
                    self.statuses[what, status] += 1
                    if status == 200:
                        self.seconds[what].append(time.monotonic() - began)
                time.sleep(float(rng.uniform(0, 2 * self.pause)))

    def act(self, what: str, http: httpx2.Client, headers: dict[str, str], name: str, rng: np.random.Generator) -> int:
        """Send one request of the kind ``what`` as the user ``name``. Returns the HTTP status."""
        number = int(rng.integers(len(self.sets)))
        support_set = self.sets[number]
        body: dict[str, Any] = {"support_set": f"set-{number}", "images": [support_set["queries"][i] for i in rng.integers(QUERIES, size=2)]}
        match what:
            case "classify" | "broken":
                chosen = [int(i) for i in rng.integers(QUERIES, size=int(rng.integers(1, 5)))]
                images = [support_set["queries"][i] for i in chosen] + ([url(b"RIFF broken")] if what == "broken" else [])
                response = http.post("/v1/classify", json={**body, "images": images}, headers=headers)
                if response.status_code == 200:
                    self.compare(response.json(), support_set, chosen, what == "broken")
                return response.status_code
            case "large":
                return http.post("/v1/classify", content=b"{" + b" " * (65 * 2**20), headers=headers).status_code
            case "key":
                return http.post("/v1/classify", json=body, headers={"Authorization": "Bearer nobody-has-this-key"}).status_code
            case "unknown":
                return http.post("/v1/classify", json={**body, "support_set": "none"}, headers=headers).status_code
            case "json":
                return http.post("/v1/classify", content=b'{"support_set": ', headers={**headers, "content-type": "application/json"}).status_code
            case "put":
                set_name = f"own-{int(rng.integers(20))}"
                response = http.put(f"/v1/support-sets/{set_name}", json={"examples": support_set["examples"]}, headers=headers)
                if response.status_code == 200:
                    with self.lock:
                        key = f"{name}/{set_name}"
                        self.stored[key] = max(self.stored.get(key, 0), response.json()["version"])
                return response.status_code
            case "chat":
                content = [{"type": "image_url", "image_url": {"url": support_set["queries"][0]}}, {"type": "text", "text": self.wording.query}]
                chat = {"model": "lcl", "messages": [{"role": "user", "content": content}], "support_set": f"set-{number}", "max_tokens": 8}
                return http.post("/v1/chat/completions", json={**chat, "stream": bool(rng.integers(2))}, headers=headers).status_code
            case _:
                return http.post("/v1/classify", json=body, headers=headers, timeout=float(rng.uniform(0.01, 0.3))).status_code

    def compare(self, reply: dict[str, Any], support_set: dict[str, Any], chosen: list[int], broken: bool) -> None:
        """Compare served probabilities with the offline engine's.

        ``chosen``: the queries' numbers; ``broken``: a broken image follows them.
        """
        results = reply["results"]
        if broken and results.pop()["error"] is None:
            self.wrong.append("a broken image was judged")
        for query, result in zip(chosen, results, strict=True):
            scaled = np.array(support_set["scores"][query]) / reply["calibration"]["temperature"]
            expected = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
            gap = float(np.abs(expected - np.array(list(result["probabilities"].values()))).max())
            with self.lock:
                self.compared += 1
                if gap > CLOSE:
                    self.wrong.append(f"a probability differs by {gap:.3g}")


def check_store(store: Path, acknowledged: dict[str, int]) -> tuple[bool, list[str]]:
    """Whether SQLite's file is intact, and the acknowledged sets that are missing or older in it.

    acknowledged: set -> version.
    """
    with closing(sqlite3.connect(store / "support.sqlite")) as connection:
        intact = connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        versions = {f"{n}/{name}": v for n, name, v in connection.execute("SELECT namespace, name, version FROM heads")}
    return intact, [key for key, version in acknowledged.items() if versions.get(key, 0) < version]


def command_of(soak: Soak, run: Path) -> tuple[list[str], Path]:
    """The server's command, and the new store that it uses."""
    folder = Path("build/soak").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    keys, store = folder / "keys.txt", folder / f"store-{time.time():.0f}"
    keys.write_text("".join(f"{name} {key}\n" for name, key in {**KEYS, "s": STRANGER, "ops": f"{OPS} admin"}.items()))
    command = [str(BIN / "lcl-adapter"), "serve", "pocket", "--adapter", f"lcl={run.absolute()}", "--api-key-file", str(keys), "--store", str(store)]
    return [*command, "--memory", f"{soak.weights / 1e6 + CACHE_MB:.0f}MB"], store


def fill(soak: Soak, client: httpx2.Client) -> None:
    """Store every support set for every user."""
    for name, key in KEYS.items():
        for number, support_set in enumerate(soak.sets):
            body = {"examples": support_set["examples"]}
            client.put(f"/v1/support-sets/set-{number}", json=body, headers={"Authorization": f"Bearer {key}"}).raise_for_status()
            soak.stored[f"{name}/set-{number}"] = 1


def killed(options: argparse.Namespace) -> dict[str, Any]:
    """Kill the server with SIGKILL while 32 clients use it.

    The next server on the same store must have every acknowledged set.
    """
    soak, rng = Soak(options.run, options.small), np.random.default_rng(7)
    soak.weights_of |= {"put": 0.34, "classify": 0.3}  # more writes, because a kill can damage those
    command, store = command_of(soak, options.run)
    damaged, missing, starts = 0, 0, []
    for turn in range(options.kills):
        began = time.monotonic()
        with running(command, "/ready") as (client, process):
            starts.append(time.monotonic() - began)
            if turn == 0:
                fill(soak, client)
            up = float(rng.uniform(1.5, 2)) if options.small else float(rng.uniform(4, 8))
            threads = [
                threading.Thread(target=soak.client, args=(100 * turn + n, str(client.base_url), time.monotonic() + up)) for n in range(soak.clients)
            ]
            for thread in threads:
                thread.start()
            time.sleep(up - float(rng.uniform(0.2, 1)))
            process.kill()
            for thread in threads:
                thread.join()
        intact, lost = check_store(store, soak.stored)
        damaged, missing = damaged + (not intact), missing + len(lost)
    unexpected = {f"{what} {status}": n for (what, status), n in soak.statuses.items() if status and status not in EXPECTED[what]}
    answered = Counter(what for (what, status), n in soak.statuses.items() for _ in range(n) if status)
    rows = [("kills", str(options.kills)), ("answers", ", ".join(f"{n} x {what}" for what, n in sorted(answered.items())))]
    rows += [("cut off or refused a connection", str(sum(n for (_, status), n in soak.statuses.items() if not status)))]
    rows += [("judgements compared with the offline engine", f"{soak.compared}, {len(soak.wrong)} wrong")]
    rows += [("answers of another kind than expected", str(unexpected or "none")), ("acknowledged sets", f"{len(soak.stored)}, {missing} lost")]
    rows += [("SQLite's integrity check after each", "ok" if not damaged else f"BROKEN {damaged} times")]
    figures = {"kills": options.kills, **soak.counts(sum(unexpected.values()), missing), "damaged": damaged}
    return finish(options, "soak-kills", ("what", "seen"), rows, {"slowest start / fastest": max(starts) / min(starts)}, figures)


def loaded(options: argparse.Namespace) -> dict[str, Any]:
    """Use one server with faults mixed in, and sample its memory."""
    soak, seconds = Soak(options.run, options.small), options.seconds or (3.0 if options.small else SECONDS)
    command, store = command_of(soak, options.run)
    with running(command, "/ready") as (client, process):
        fill(soak, client)
        levels: list[int] = []
        threads = [threading.Thread(target=soak.client, args=(n, str(client.base_url), time.monotonic() + seconds)) for n in range(soak.clients)]
        for thread in threads:
            thread.start()
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(seconds / 20)
            levels.append(process.memory_info().rss)
        for thread in threads:
            thread.join()
        time.sleep(0.1 if options.small else 2)
        after = process.memory_info().rss
    intact, lost = check_store(store, soak.stored)
    unexpected = {f"{what} {status}": n for (what, status), n in soak.statuses.items() if status not in EXPECTED[what]}
    rows = [(what, ", ".join(f"{n} x {s or 'went away'}" for (w, s), n in sorted(soak.statuses.items()) if w == what)) for what in soak.weights_of]
    rows += [("judgements compared with the offline engine", f"{soak.compared}, {len(soak.wrong)} wrong")]
    rows += [("answers of another kind than expected", str(unexpected or "none")), ("acknowledged sets", f"{len(soak.stored)}, {len(lost)} lost")]
    rows += [("SQLite's integrity check", "ok" if intact else "BROKEN")]
    early, late = float(np.median(levels[3:8])), float(np.median(levels[-5:]))
    rows += [("resident memory, start / middle / end / after", " / ".join(f"{v / 1e6:.0f} MB" for v in (levels[0], early, late, after)))]
    figures = {**soak.counts(sum(unexpected.values()), len(lost)), "damaged": int(not intact)}
    return finish(options, "soak", ("what", "seen"), rows, {"resident memory, last quarter / second": late / early}, figures)


def use(soak: Soak, address: str, seconds: float, process: Any) -> list[int]:
    """Let all clients use the server for so many seconds. Returns its resident memory, measured twenty times."""
    until, levels = time.monotonic() + seconds, []
    threads = [threading.Thread(target=soak.client, args=(n, address, until)) for n in range(soak.clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        time.sleep(seconds / 20)
        levels.append(process.memory_info().rss)
    for thread in threads:
        thread.join()
    return levels


def beside_strangers(options: argparse.Namespace) -> dict[str, Any]:
    """Honest clients alone, and then beside strangers, on one server."""
    soak, seconds = Soak(options.run, options.small), options.seconds or (5.0 if options.small else SECONDS)
    soak.weights_of, soak.pause, soak.clients = dict(HONEST), HONEST_PAUSE, 2 if options.small else HONEST_CLIENTS
    command, store = command_of(soak, options.run)
    with running(command, "/ready") as (client, process):
        fill(soak, client)
        address = str(client.base_url)
        use(soak, address, 1.0 if options.small else WARM_UP, process)
        soak.seconds.clear()
        use(soak, address, 0.4 * seconds, process)
        usual, soak.seconds = soak.seconds, defaultdict(list)
        arguments = [sys.executable, "-m", "benchmarks.strangers", address, STRANGER, str(0.6 * seconds), *(["small"] if options.small else [])]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
            assert other.stdout is not None
            if other.stdout.readline().strip() != "ready":
                raise SystemExit("soak: the strangers could not prepare their requests")
            assert other.stdin is not None
            other.stdin.write("begin\n")
            other.stdin.flush()
            levels = use(soak, address, 0.6 * seconds, process)
            answered = json.loads(other.stdout.readline())
        counted = {line.partition(" ")[0]: line.rpartition(" ")[2] for line in client.get("/metrics", headers=ADMIN).text.splitlines()}
        time.sleep(0.1 if options.small else 25)  # the answers that nobody read have ended by then
        after = process.memory_info().rss
    intact, lost = check_store(store, soak.stored)
    unexpected = {f"{what} {status}": n for (what, status), n in soak.statuses.items() if status not in EXPECTED[what]}
    rows, slowest = [], 0.0
    for what in HONEST:
        before, beside = usual[what], soak.seconds[what]
        if len(before) > 1 and beside:
            p99 = quantiles(before, n=100)[98]
            slowest = max(slowest, max(beside) / p99)
            seconds = (median(before), p99, max(before), median(beside), quantiles([*beside, *beside], n=100)[98], max(beside))
            measured = " / ".join(f"{1000 * value:.0f}" for value in seconds)
            alone = f"{what}: median / 99 % / slowest of {len(before)} alone"
            rows += [(f"{alone}, and of {len(beside)} beside strangers, ms", measured)]
    by_kind: dict[str, list[str]] = defaultdict(list)
    for answer, n in answered["answers"].items():
        kind, _, status = answer.rpartition(": ")
        by_kind[kind].append(f"{n} x {status}")
    rows += [(f"stranger's {kind}", ", ".join(counts)) for kind, counts in by_kind.items()]
    rows += [("strangers' requests that were not refused as promised", str(answered["wrong"] or "none"))]
    rows += [
        (name, counted.get(f"lcl_{name}_total", "-")) for name in ("decoders_killed", "pictures_refused", "connections_late", "connections_unread")
    ]
    rows += [("judgements compared with the offline engine", f"{soak.compared}, {len(soak.wrong)} wrong")]
    rows += [("answers of another kind than expected", str(unexpected or "none")), ("acknowledged sets", f"{len(soak.stored)}, {len(lost)} lost")]
    early, late = float(np.median(levels[3:8])), float(np.median(levels[-5:]))
    rows += [("resident memory, start / middle / end / after", " / ".join(f"{v / 1e6:.0f} MB" for v in (levels[0], early, late, after)))]
    ratios = {"slowest honest request / usual p99": slowest, "resident memory, last quarter / second": late / early}
    figures = {**soak.counts(sum(unexpected.values()), len(lost)), "damaged": int(not intact), "not refused": answered["wrong answers"]}
    figures["strangers' requests"] = sum(answered["answers"].values())
    result = finish(options, "soak-strangers", ("what", "measured"), rows, ratios, figures)
    if not options.small and slowest > SLOWEST:
        raise SystemExit(f"soak: an honest request needed {slowest:.2f} times the usual 99th percentile; at most {SLOWEST:g} are allowed")
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__)
    made.add_argument("run", type=Path, nargs="?", default=Path("runs/quickstart"))
    made.add_argument("seconds", type=float, nargs="?", help=f"how long [default: {SECONDS:.0f}]")
    made.add_argument("--kills", type=int, default=0, help="kill the server so often")
    made.add_argument("--strangers", action="store_true", help="honest clients alone, and then beside hostile ones")
    options = options_of(made, "benchmarks.soak", arguments)
    result = beside_strangers(options) if options.strangers else killed(options) if options.kills else loaded(options)
    figures = result["figures"]
    if any(figures.get(fault) for fault in ("wrong", "unexpected", "lost", "damaged", "not refused")) or not figures["compared"]:
        raise SystemExit("soak: a wrong or unexpected answer, a lost set, a damaged store, or nothing compared")
    return result


if __name__ == "__main__":
    main()
