"""Stored sets that grow and shrink by a photo: API, client, commands, and what the server reads again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from starlette.testclient import TestClient

from lcl_adapter.answering import api_types
from lcl_adapter.answering.client import Endpoint
from lcl_adapter.base.model import load_base
from lcl_adapter.base.ref import BaseRef
from lcl_adapter.cli import main
from lcl_adapter.errors import ConflictError, RequestError
from lcl_adapter.serve import api
from lcl_adapter.serve.engine import Engine
from lcl_adapter.serve.service import Service
from lcl_adapter.serve.store import Store
from tests.live import running
from tests.test_files import in_threads
from tests.test_merge import adapter_on
from tests.test_serve import client_of, error_of, examples, png, put, url

PHOTOS = "/v1/support-sets/parts-set/photos"


@pytest.fixture(scope="module")
def run_folder(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained with labelled pictures that do not see each other."""
    run = adapter_on(tiny_folder("pocket"), tmp_path_factory.mktemp("runs") / "apart")
    manifest = json.loads((run / "lcl_adapter.json").read_text())
    (run / "lcl_adapter.json").write_text(json.dumps({**manifest, "supports": "independent"}))
    recipe = (run / "recipe.yaml").read_text()
    assert "supports:" not in recipe
    (run / "recipe.yaml").write_text(f"{recipe}\nsupports: independent\n")
    return run


@pytest.fixture(scope="module")
def engine(tiny_folder: Callable[[str], Path], run_folder: Path) -> Iterator[Engine]:
    made = Engine(load_base(BaseRef(str(tiny_folder("pocket")), device="cpu")), memory=10**8, queue=64)
    made.load_adapter("apart", run_folder)
    yield made.start()
    made.stop()


@pytest.fixture
def service(engine: Engine, tmp_path: Path) -> Iterator[Service]:
    made = Service(engine, Store(tmp_path / "store"), timeout=60)
    yield made
    made.store.close()


@pytest.fixture
def client(service: Service) -> TestClient:
    return client_of(service)


def classified(client: Any, model: str = "apart", name: str = "parts-set") -> dict[str, float]:
    response = client.post("/v1/classify", json={"support_set": name, "images": [url(png(77))], "model": model})
    assert response.status_code == 200, response.text
    probabilities: dict[str, float] = response.json()["results"][0]["probabilities"]
    return probabilities


def labels_of(client: Any) -> list[str]:
    return [example["label"] for example in client.get("/v1/support-sets/parts-set").json()["examples"]]


@pytest.mark.parametrize("model", ["apart", "base"])
def test_a_changed_set_answers_as_one_that_was_made_at_once(model: str, client: TestClient) -> None:
    shown = examples(shots=3)
    assert put(client, examples=shown[:-1]).json()["version"] == 1
    before = classified(client, model)
    grown = client.post(PHOTOS, json=shown[-1]).json()
    assert (grown["version"], grown["labels"]) == (2, {"good": 3, "scratched": 3})
    put(client, "at-once", examples=shown)
    assert classified(client, model) == pytest.approx(classified(client, model, "at-once"), abs=1e-4)
    shrunk = client.delete(f"{PHOTOS}/5").json()
    assert (shrunk["version"], shrunk["labels"]) == (3, {"good": 3, "scratched": 2})
    assert classified(client, model) == pytest.approx(before, abs=1e-4)
    assert client.get("/v1/support-sets/parts-set", params={"version": 2}).json()["labels"] == grown["labels"], "an earlier version stays"


def test_only_the_new_photo_is_read(client: TestClient, reads: list[int]) -> None:
    put(client, examples=examples(shots=3, seed=2000))
    classified(client)
    assert reads == [6], "the set's photos once; the folds of its calibration have nothing else"
    reads.clear()
    client.post(PHOTOS, json={"label": "good", "image": url(png(500))})
    classified(client)
    assert reads == [1]
    client.delete(f"{PHOTOS}/2")
    classified(client)
    assert reads == [1]


def test_nothing_is_shared_between_callers(client: TestClient, service: Service, reads: list[int]) -> None:
    """A photo that another caller has shown is read anew: the time would show that it was there."""
    put(client, examples=examples(shots=2))
    classified(client)
    request = api_types.SupportSetIn.model_validate({"examples": examples(shots=2)})
    service.put("somebody else", "parts-set", request)
    reads.clear()
    asked = service.classify("somebody else", api_types.ClassifyIn(support_set="parts-set", images=[url(png(77))], model="apart"))
    for future in asked.futures:
        future.result(60)
    assert sum(reads) == 4


def test_a_calibration_belongs_to_a_version(client: TestClient, service: Service) -> None:
    put(client, examples=examples(shots=3))
    classified(client)
    client.post(PHOTOS, json={"label": "good", "image": url(png(500))})
    stored = service.store.get("local", "parts-set")
    identity = service.engine.find("apart").identity
    assert service.store.read_calibration(stored.id, identity) is None
    classified(client)
    assert service.store.read_calibration(stored.id, identity) is not None


@pytest.mark.parametrize(
    ("number", "message"),
    [(0, "the only one of 'good', and the label would go with it"), (4, "there is no photo 4: the set has the photos 0 to 3"), (10**6, "number")],
)
def test_a_photo_that_cannot_be_dropped_is_named(client: TestClient, number: int, message: str) -> None:
    shown = [*examples(shots=1), *examples(("scratched",), shots=3, seed=300)[1:]]
    put(client, examples=shown)
    response = client.delete(f"{PHOTOS}/{number}")
    assert response.status_code == 400
    assert message in error_of(response)["message"]
    assert len(labels_of(client)) == 4


@pytest.mark.parametrize(
    ("photo", "message"),
    [
        ({"label": "Good", "image": url(png(500))}, "differ only in case or width"),
        ({"label": "good", "image": url(png(0))}, "has this photo as 'good' already (photo 0)"),
        ({"label": "good", "image": url(b"no picture")}, "image"),
        ({"label": "", "image": url(png(500))}, "label"),
        ({"label": "good"}, "image"),
        ({"label": "<image>", "image": url(png(500))}, "special token"),
    ],
)
def test_a_photo_that_cannot_be_added_is_refused(client: TestClient, service: Service, photo: dict[str, str], message: str) -> None:
    put(client)
    response = client.post(PHOTOS, json=photo)
    assert response.status_code == 400
    assert message in error_of(response)["message"]
    assert client.get("/v1/support-sets/parts-set").json()["version"] == 1


def test_a_set_has_at_most_so_many_photos(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    put(client)
    monkeypatch.setattr(api_types, "MAX_IMAGES", 4)
    assert "at most 4: drop one first" in error_of(client.post(PHOTOS, json={"label": "good", "image": url(png(500))}))["message"]


def test_a_set_that_is_not_there_has_no_photo_added(client: TestClient, service: Service) -> None:
    for response in (client.post(PHOTOS, json={"label": "good", "image": url(png(0))}), client.delete(f"{PHOTOS}/0")):
        assert response.status_code == 404
        error_of(response)
    assert not [file for file in (service.store.folder / "images").rglob("*") if file.is_file()]


def test_photos_that_two_writers_add_at_once_are_both_there(client: TestClient) -> None:
    put(client)

    def work(name: str) -> None:
        for number in range(5):
            photo = {"label": "good", "image": url(png(1000 * ord(name[0]) + number))}
            assert client.post(PHOTOS, json=photo).status_code == 200

    in_threads(work)
    assert len(labels_of(client)) == 4 + 10
    assert client.get("/v1/support-sets/parts-set").json()["version"] == 1 + 10


def test_a_writer_that_read_an_older_version_gets_a_conflict(service: Service) -> None:
    with running(api.make_app(service), lifespan="off") as address, Endpoint(address) as endpoint:
        endpoint.put_set("parts-set", api_types.SupportSetIn.model_validate({"examples": examples()}))
        photo = api_types.PhotoIn(label="good", image=url(png(500)), expected_version=1)
        assert endpoint.add_photo("parts-set", photo).version == 2
        with pytest.raises(ConflictError, match="is at version 2, not 1"):
            endpoint.add_photo("parts-set", photo.model_copy(update={"image": url(png(501))}))
        with pytest.raises(ConflictError, match="is at version 2, not 1"):
            endpoint.drop_photo("parts-set", 0, expected_version=1)
        assert endpoint.drop_photo("parts-set", 0).labels == {"good": 2, "scratched": 2}
        with pytest.raises(RequestError, match="there is no photo 40"):
            endpoint.drop_photo("parts-set", 40)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_commands_add_and_drop_a_photo(tmp_path: Path) -> None:
    photos, store = tmp_path / "photos", ("--store", tmp_path / "store")
    for label, seed in (("good", 0), ("scratched", 10)):
        (photos / label).mkdir(parents=True)
        for number in range(2):
            (photos / label / f"{number}.png").write_bytes(png(seed + number))
    (tmp_path / "new.png").write_bytes(png(99))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert call("support", "add", "parts", photos, *store).exit_code == 0
    added = call("support", "add-photo", "parts", "scratched", tmp_path / "new.png", "--json", *store)
    assert json.loads(added.stdout)["labels"] == {"good": 2, "scratched": 3}
    shown = call("support", "show", "parts", *store).stdout.splitlines()
    assert [line.split()[0] for line in shown[1:]] == ["0", "1", "2", "3", "4"]
    dropped = call("support", "drop-photo", "parts", 4, "--json", "--expected-version", 2, *store)
    assert json.loads(dropped.stdout) | {"created": 0} == {
        "name": "parts", "version": 3, "created": 0, "labels": {"good": 2, "scratched": 2}, "question": None,
    }  # fmt: skip
    for arguments, message in (
        (("drop-photo", "parts", 17), "there is no photo 17"),
        (("drop-photo", "parts", 0, "--expected-version", 1), "at version 3, not 1"),
        (("drop-photo", "none", 0), "no support set 'none'"),
        (("add-photo", "parts", "good", tmp_path / "broken.png"), "broken.png"),
        (("add-photo", "parts", "good", tmp_path / "missing.png"), "missing.png"),
        (("add-photo", "parts", "GOOD", tmp_path / "new.png"), "differ only in case"),
        (("add-photo", "parts", "a\nb\x07", tmp_path / "new.png"), "one line of visible text"),
    ):
        refused = call("support", *arguments, *store)
        assert refused.exit_code in {1, 2}, refused.output
        assert message in " ".join(refused.output.split())
        assert "Traceback" not in refused.output
    assert json.loads(call("support", "show", "parts", "--json", *store).stdout)["version"] == 3
