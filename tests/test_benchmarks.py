"""Every benchmark runs to its end at a small size: its figures are finite, and its two sides agree. Not how fast they are.

``benchmarks.gpu`` has tests/test_gpu_benchmark.py.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
import uvicorn
from transformers.cli.serve import Serve
from transformers.models.clip import modeling_clip

from benchmarks import calibrate, common, data, long, merge, plan, predict, serve, soak, strangers, train
from lcl_adapter import cli
from lcl_adapter.base.adapter import save_adapter
from lcl_adapter.base.model import attach, load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.recipe.schema import AdapterOptions


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a benchmark gives a child process runs in this one, because a child spends its time on imports. All files go
    to ``tmp_path``.
    """

    def child(module: str, *arguments: str) -> Any:
        return json.loads(json.dumps(importlib.import_module(module).main(arguments)))

    for benchmark in (train, long, data, merge, plan):
        monkeypatch.setattr(benchmark, "child", child)
    for benchmark in (data, merge, plan):
        monkeypatch.setattr(benchmark, "FOLDER", tmp_path / "build")
    for benchmark in (train, long, calibrate, soak, predict):
        monkeypatch.setattr(benchmark, "THREADS", torch.get_num_threads())
    monkeypatch.setattr(common, "RANDOM_SMALL", tmp_path / "random")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new adapter on the shipped base."""
    folder = tmp_path_factory.mktemp("run")
    base = attach(load_base(BaseRef("pocket", device="cpu")), AdapterOptions(rank=4))
    torch.manual_seed(0)
    for name, parameter in base.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    save_adapter(base, folder, "pocket", {})
    (folder / "recipe.yaml").write_text("base: pocket\nsources: {lcl: {type: pocket}}\n")
    return folder


def finite(result: dict[str, Any]) -> dict[str, float]:
    """Ratios and figures together."""
    numbers = {**result["ratios"], **result["figures"]}
    assert result["ratios"]
    assert all(math.isfinite(value) for value in numbers.values()), numbers
    assert all(len(row) == len(result["columns"]) for row in result["rows"])
    return numbers


def test_predict() -> None:
    assert finite(predict.main(["--small"]))["same_answers"] == 1


@pytest.mark.filterwarnings("ignore")  # of the stock trainer
def test_train(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = itertools.count(10**9, 10**6)
    monkeypatch.setattr(train, "peak", lambda: next(steps))  # in one process, the second side's peak is the first's
    numbers = finite(train.main(["pocket", "--small"]))
    assert numbers["pocket_queries_a_second"] > 0
    assert numbers["pocket_first_loss_ours"] == pytest.approx(numbers["pocket_first_loss_stock"], rel=0.05), (
        "the same rows; a tokenizer may split an answer in another way"
    )


@pytest.mark.filterwarnings("ignore")  # of the stock trainer
def test_train_on_a_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows and rows as they are learn the same tokens with the same loss, in both orders, and packed ones have less padding."""
    steps = itertools.count(10**9, 10**6)
    monkeypatch.setattr(train, "peak", lambda: next(steps))

    numbers = finite(train.main(["mixture", "--small"]))
    assert {numbers[f"{name}_learned"] for name in train.LAYOUTS} == {numbers["packed_learned"]}
    for name in train.LAYOUTS:
        assert numbers[f"{name}_loss"] == pytest.approx(numbers["packed_loss"], rel=1e-5)
    assert numbers["packed_padding"] < numbers["as_they_are_padding"]
    assert numbers["sorted_packed_padding"] <= numbers["sorted_padding"]
    assert numbers["mixture_queries_a_second"] > 0


def test_long(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = itertools.count(10**9, 10**6)
    monkeypatch.setattr(long, "peak", lambda: next(steps))
    numbers = finite(long.main(["--small"]))
    assert numbers["long_learned"] == numbers["short_learned"] > 0, "both sides learn the same number of tokens"
    assert (numbers["long_pictures"], numbers["short_pictures"]) == (33, 5)
    assert 0 < numbers["7B_nf4_long_GB"] < 12


def test_data() -> None:
    assert finite(data.main(["--small"]))["same_rows"] == 1


def test_merge() -> None:
    numbers = finite(merge.main(["--small"]))
    assert numbers["fp32: ulp"] <= 1
    assert numbers["bf16: ulp"] <= 1


def test_plan() -> None:
    assert finite(plan.main(["--small"]))["forecast of 7B in GB"] == pytest.approx(10, abs=5)


def test_calibrate(run: Path) -> None:
    numbers = finite(calibrate.main([str(run), "--small"]))
    assert all(0 <= value <= 1 for value in numbers.values())


class Here:
    """A server in this process, with what the benchmarks ask of its process."""

    def __init__(self, server: uvicorn.Server) -> None:
        self.server = server

    def memory_info(self) -> Any:
        return psutil.Process().memory_info()

    def kill(self) -> None:
        """No connection and no port stay, and no answer is finished."""

        def stop() -> None:
            for listening in self.server.servers:
                listening.close()
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()
            self.server.should_exit = self.server.force_exit = True

        self.server.servers[0].get_loop().call_soon_threadsafe(stop)


@pytest.fixture
def servers_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The commands of servers run in threads of this process. Everything is done as in a process of their own, but a kill
    ends no thread.
    """
    made: list[uvicorn.Server] = []

    class Server(uvicorn.Server):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    @contextmanager
    def running(command: list[str], ready_path: str, **variables: str) -> Iterator[tuple[httpx2.Client, Here]]:
        if "ENCODED" in variables:
            monkeypatch.setenv("ENCODED", variables["ENCODED"])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(modeling_clip.CLIPVisionModel, "forward", modeling_clip.CLIPVisionModel.forward)  # put back at the end
                exec(serve.COUNTER, {})
                yield from started(command, ready_path)
        else:
            yield from started(command, ready_path)

    def started(command: list[str], ready_path: str) -> Iterator[tuple[httpx2.Client, Here]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        program, *arguments = command
        before = len(made)
        start = {"lcl-adapter": lambda line: cli.main(line, standalone_mode=False), "transformers": transformers_cli}[Path(program).name]
        thread = threading.Thread(target=start, args=([*arguments, "--port", port],))
        thread.start()
        while len(made) <= before or not made[-1].started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert client.get(ready_path).status_code == 200
            yield client, Here(made[-1])
        made[-1].should_exit = True
        thread.join(30)

    def transformers_cli(line: list[str]) -> None:
        assert line[0] == "serve"
        named = dict(zip([name.removeprefix("--") for name in line[2::2]], line[3::2], strict=True))
        Serve(line[1], **{**named, "port": int(named["port"])})

    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.setattr(serve, "running", running)
    monkeypatch.setattr(soak, "running", running)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("servers_here")
@pytest.mark.filterwarnings("ignore")  # of transformers' server
def test_serve() -> None:
    numbers = finite(serve.main(["--small"]))
    assert numbers["same texts"] == 1
    assert numbers["stored set / transformers serve"] > 0
    assert numbers["pictures encoded a question, stored set"] == 1
    assert numbers["pictures encoded a question, transformers serve"] == 2 * serve.SHOTS + 1
    assert numbers["kB uploaded a question, transformers serve / stored set"] == pytest.approx(2 * serve.SHOTS + 1, rel=0.02)


@pytest.mark.usefixtures("servers_here")
def test_soak(run: Path) -> None:
    numbers = finite(soak.main([str(run), "2", "--small"]))
    assert numbers["compared"] > 0
    assert {numbers[fault] for fault in ("wrong", "unexpected", "lost", "damaged")} == {0}


@pytest.mark.usefixtures("servers_here")
def test_soak_beside_strangers(run: Path) -> None:
    """Both phases run, what strangers send is refused as promised, and honest clients are judged right."""
    result = soak.main([str(run), "5", "--strangers", "--small"])
    numbers = finite(result)
    assert numbers["compared"] > 0
    assert {numbers[fault] for fault in ("wrong", "unexpected", "lost", "damaged", "not refused")} == {0}
    assert numbers["strangers' requests"] > 20
    measured = dict(result["rows"])
    of_classify = next(what for what in measured if what.startswith("classify: "))
    alone, beside = (int(count) for count in re.findall(r"of (\d+) ", of_classify))
    assert min(alone, beside) > 1
    for kind in ("picture, costly", "body, ", "connection, unread"):
        assert any(what.startswith(f"stranger's {kind}") for what in measured), kind


def test_an_answer_that_strangers_must_not_get_is_noticed() -> None:
    """Each is a refusal in OpenAI's form, or it counts as wrong."""
    fault = {"message": "no", "type": "invalid_request_error", "param": None, "code": None}
    assert not strangers.fault_of(httpx2.Response(400, json={"error": fault}))
    for response in (
        httpx2.Response(200, json={"error": fault}),
        httpx2.Response(500, json={"error": fault}),
        httpx2.Response(400, text="Traceback"),
        httpx2.Response(400, json={"detail": "no"}),
        httpx2.Response(400, json={"error": {**fault, "message": "x" * 5000}}),
    ):
        assert strangers.fault_of(response)


@pytest.mark.usefixtures("servers_here")
def test_soak_with_kills(run: Path) -> None:
    numbers = finite(soak.main([str(run), "--kills", "2", "--small"]))
    assert numbers["kills"] == 2
    assert numbers["compared"] > 0
    assert {numbers[fault] for fault in ("wrong", "unexpected", "lost", "damaged")} == {0}


def test_a_child_returns_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "side.py").write_text(
        "import sys\nprint('a warning')\nprint('{\"given\": \"' + sys.argv[1] + '\"}')\nsys.exit(sys.argv[1] == 'fail')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert common.child("side", "--small") == {"given": "--small"}
    with pytest.raises(subprocess.CalledProcessError):
        common.child("side", "fail")


def test_both_sides_of_the_training_benchmark_see_the_same_questions() -> None:
    from lcl_adapter.data.conversations import WORDINGS, to_conversation
    from lcl_adapter.data.mixture import Mixture

    made = train.recipe("pocket", 2, 1, "out")
    conversation = to_conversation(Mixture(made).draw(0), WORDINGS["short"])
    assert len(conversation.branches) == train.QUERIES
    row = train.stock_row(conversation, 1)
    assert row["completion"][0]["content"][0]["text"] == conversation.branches[1][-1].text
    assert len(row["images"]) == 5


def test_the_prediction_benchmark_asks_what_it_says() -> None:
    support, queries = predict.episode(8, 32)
    assert sum(t.picture is not None for t in support) == 16
    assert len(queries) == 32
