"""The server: who may ask for what, and what it writes."""

import http.client
import json

import pytest

from fasttc.graph import Supernodes
from fasttc.report import FeatureFolder, PageServer, page_data, read_state
from fasttc.report.serve import MAX_BODY
from fasttc.report.state import origin

STATE = {
    "schema": "fasttc.supernodes/1",
    "groups": [{"name": "fever", "members": ["1_2_3", "1_2_4"]}],
    "labels": {"1_2_3": "</script>"},
    "pinned": ["1_2_3"],
    "page": {"moved": {"1_2_3": [1, 2]}},
}
WRITTEN = {**STATE, "page": {**STATE["page"], "from": origin(None)}}
"""``STATE`` as a page that started with nothing saves it."""


@pytest.fixture
def server(serve, small, tmp_path, write_features):
    layer, _, index = small.features[0].tolist()
    folders = [
        FeatureFolder(write_features([(layer, index)])),
        FeatureFolder(write_features([(layer, index)], text="drug", name="adapters", owner="adapter")),
    ]
    return serve(page_data(small), state_file=tmp_path / "g.supernodes.json", features=folders)


def ask(server: PageServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
    """(status, headers, body) of one request; ``path`` is below the secret unless it starts with a slash."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    path = path if path.startswith("/") else f"/{server.token}/{path}"
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def post(server: PageServer, content, **headers: str):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    usual = {"Origin": f"http://127.0.0.1:{server.server_port}", "Content_Type": "application/json"}
    return ask(server, "state", "POST", body, **{**usual, **headers})


def test_only_this_machine_listens(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/{server.token}/"
    assert len(server.token) >= 32


def test_the_page_and_its_headers(server):
    status, headers, body = ask(server, "")
    assert status == 200
    assert body.startswith(b"<!doctype html>")
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Server"].strip() == "fasttc"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/wrong/",
        "/state",
        "/%2e%2e/etc/passwd",
        "/../../etc/passwd",
        "//etc/passwd",
        "/%C3%A9/",
    ],
)
def test_without_the_secret_there_is_nothing(server, path):
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "state", "../", "..%2f..%2fetc/passwd", "features/../../etc/passwd", "features/1/2", "features/base/1/2",
        "features/adapter/-1/2", "features/adapter/1/2.json", "features/transcoder/9999999/1",
        "_assets/page.css", "features/", "index.html",
    ],
)  # fmt: skip
def test_no_address_becomes_a_path(server, path):
    status, _, body = ask(server, path)
    assert (status, body) == (404, b"Not Found\n")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1", ""])
def test_other_host_names_are_refused(server, host):
    assert ask(server, "", Host=host)[0] == 403
    assert post(server, STATE, Host=host)[0] == 403


def test_feature_evidence_by_owner_and_number(server, small):
    layer, _, index = small.features[0].tolist()
    status, headers, body = ask(server, f"features/transcoder/{layer}/{index}")
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body)["top"] == ["fever", "hip"]
    assert json.loads(ask(server, f"features/adapter/{layer}/{index}")[2])["top"] == ["drug", "hip"]
    assert json.loads(ask(server, "features/transcoder/999/1")[2]) is None


def test_a_broken_feature_file_is_a_message(server, small):
    layer, _, index = small.features[0].tolist()
    for file in server.features[0].path.iterdir():
        file.write_text("[]")
    status, _, body = ask(server, f"features/transcoder/{layer}/{index}")
    assert status == 400
    assert b"expected a feature file" in body


def test_state_is_saved_and_comes_back(server):
    assert post(server, STATE)[0] == 200
    assert read_state(server.state_file) == WRITTEN
    assert Supernodes.load(server.state_file).groups == {"fever": ("1_2_3", "1_2_4")}
    assert b"</script>" not in server.state_file.read_bytes()
    assert b'"fever"' in ask(server, "")[2]
    assert [path.name for path in server.state_file.parent.iterdir() if path.is_file()] == [
        server.state_file.name
    ]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 100_000, 400),
        ({}, 400),
        ({**STATE, "schema": "fasttc.supernodes/2"}, 400),
        ({**STATE, "groups": [{"name": "", "members": ["a"]}]}, 400),
        ({**STATE, "labels": {"a": 1}}, 400),
        (b'{"schema": "fasttc.supernodes/1", "page": {"moved": NaN}}', 400),
    ],
)
def test_wrong_state_is_refused_and_the_file_kept(server, content, status):
    post(server, STATE)
    before = server.state_file.read_bytes()
    answer, _, body = post(server, content)
    assert answer == status
    assert len(body.decode().splitlines()) == 1
    assert server.state_file.read_bytes() == before


def test_only_the_page_itself_may_save(server):
    assert post(server, STATE, Origin="http://evil.example")[0] == 403
    assert post(server, STATE, Origin="null")[0] == 403
    assert ask(server, "state", "POST", b"{}", Content_Type="application/json")[0] == 403
    assert post(server, STATE, Content_Type="text/plain")[0] == 415
    assert not server.state_file.exists()


def test_size_is_limited_before_anything_is_read(server):
    assert post(server, b"", Content_Length=str(MAX_BODY + 1))[0] == 413
    assert post(server, b"", Content_Length="-1")[0] == 411
    assert post(server, b"", Content_Length="many")[0] == 411


def test_other_places_and_methods(server):
    assert ask(server, "", "POST", b"")[0] == 404
    assert ask(server, "", "DELETE")[0] == 501


def test_starts_from_the_given_state_until_there_is_a_file(serve, small, tmp_path):
    server = serve(page_data(small), state_file=tmp_path / "s.json", state={**STATE, "pinned": []})
    assert server.state()["pinned"] == []
    assert post(server, STATE)[0] == 200
    assert read_state(server.state_file) == WRITTEN | {
        "page": {**STATE["page"], "from": origin(server.initial)}
    }
    assert server.state() == read_state(server.state_file)


def test_a_broken_state_file_stops_the_start(small, tmp_path):
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(ValueError, match=r"s\.json: schema: expected"):
        PageServer(page_data(small), state_file=tmp_path / "s.json")


def test_unwritable_files_are_reported(server):
    server.state_file = server.state_file.parent / "no" / "x" / "\0"
    status, _, body = post(server, STATE)
    assert status in (400, 507)
    assert body
