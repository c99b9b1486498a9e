"""The page fills gaps as `sedd sample` does, loses no request under load, and answers what is wrong with a reason."""

import concurrent.futures
import contextlib
import dataclasses
import gc
import http.client
import importlib
import json
import pathlib
import re
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import jax
import numpy as np
import pytest

import sedd_jax.serving
from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.data import alphabets
from sedd_jax.sampling import generate, templates
from sedd_jax.serving import pieces, queue, requests
from tests.support import places, slow, small_runs

pytest.importorskip("starlette", reason="the page needs sedd_jax[serve]")
uvicorn = pytest.importorskip("uvicorn", reason="the page needs sedd_jax[serve]")
serve = importlib.import_module("sedd_jax.serving.app")  # Only where both are.
connections = importlib.import_module("sedd_jax.serving.connections")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TEMPLATE = "a = {3}\nb = {6}\na"


@pytest.fixture(scope="module")
def opened(code_run):
    return requests.open_run(code_run, None)


def _start(code_run, *arguments):
    """The process of `sedd serve`, which computes exactly as this one, and the address that it printed."""
    # Where these tests run in the background SIGINT is ignored, and so it would be there.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from sedd_jax.cli import main; sys.argv[0] = 'sedd'; main.run()"
    )
    command = [sys.executable, "-c", code, "serve", f"--workdir={code_run}", "--port=0", *arguments]
    environment, here = small_runs.environment(len(jax.devices())), places.REPOSITORY
    process = subprocess.Popen(command, env=environment, cwd=here, stdout=subprocess.PIPE)
    return process, process.stdout.readline().decode().strip()


@pytest.fixture(scope="module")
def server(code_run):
    """A server in a process of its own: process and address."""
    process, url = _start(code_run)
    yield process, url
    process.terminate()
    process.communicate()


@contextlib.contextmanager
def _serving(opened, **options):
    """The address of a server in this process."""
    app = serve.app(opened, **options)
    config = uvicorn.Config(
        app, port=0, http=connections.Connection, log_config=None, ws="none", timeout_graceful_shutdown=1
    )
    running = uvicorn.Server(config)
    with contextlib.closing(serve._listen("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()


def _events(body):
    """Names and contents of server-sent events."""
    parts = [part.splitlines() for part in body.decode().split("\n\n") if part]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def _ask(url, query="", /, **parameters):
    query = query or urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}/api/draw?{query}", timeout=120) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        return _events(response.read())


def _refusal(request):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    with caught.value as answer:
        assert answer.headers["Content-Type"] == "application/json"
        return answer.code, json.loads(answer.read())["error"], answer.headers


def _sampled(command, capsys):
    """What the command line prints as its texts."""
    program, *arguments = shlex.split(command)
    assert program == "sedd"
    capsys.readouterr()
    assert cli.main([*arguments, "--json", "--num_processes=1"]) == 0
    return [sample["text"] for sample in json.loads(capsys.readouterr().out.splitlines()[-1])]


def _answer(url, host):
    """Status and text of an answer to a browser that knows the server as `host`."""
    with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)) as connection:
        connection.request("GET", "/api/run", headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def _drawn(opened, template, seed, **settings):
    checkpoint = opened.checkpoint
    with checkpoint.on_devices():
        sampling = checkpoint.run.sampling(num_samples=1, **settings)
        parsed = templates.parse(checkpoint.run, template)
        return generate.draw_samples(checkpoint, parsed, sampling, seed=seed)[0].text


@pytest.fixture(scope="module")
def uniform(opened):
    """A run on the uniform graph that nobody trained, of all printable characters."""
    tokenizer = alphabets.Characters(alphabet=string.printable)
    return requests.Opened(checkpoint=small_runs.on_uniform_graph(opened.checkpoint, tokenizer=tokenizer))


# What is drawn


@pytest.mark.parametrize(
    ("sampler", "num_samples", "draw"),
    slow.all_but(
        [("tweedie", 1, "precise")],
        [("tweedie", 1, "precise"), ("theta_trapezoidal", 1, "precise"), ("first_hitting", 2, "published")],
    ),
)
def test_a_trajectory_ends_in_what_the_command_draws(server, capsys, sampler, num_samples, draw):
    settings = {"sampler": sampler, "num_samples": num_samples, "draw": draw, "num_steps": 6}
    events = _ask(server[1], template=TEMPLATE, seed=7, **settings)
    names = [name for name, _ in events]
    steps = [content for name, content in events if name == "step"]
    assert names == ["queued", "started", *["step"] * len(steps), "done"]
    # The default was compiled before the server answered.
    assert events[1][1] == {"is_first": sampler != "tweedie"}
    assert [step["taken"] for step in steps] == list(range(len(steps)))
    given = "".join(part for part in TEMPLATE if part not in "{36}")
    for step in steps:
        assert len(step["samples"]) == num_samples
        for row in step["samples"]:
            assert "".join(text for kind, text in row if kind == "given") == given
            assert sum(len(text) for _, text in row) == len(given) + 9
    masked = [sum(len(text) for kind, text in step["samples"][0] if kind == "mask") for step in steps]
    new = [sum(len(text) for kind, text in step["samples"][0] if kind == "new") for step in steps]
    assert masked[0] == 9
    assert masked[-1] == 0
    assert (-np.diff(masked)).tolist() == new[1:]
    done = events[-1][1]
    assert ["".join(text for _, text in pieces) for pieces in steps[-1]["samples"]] == done["texts"]
    assert (done["sampler"], done["draw"], done["seed"]) == (sampler, draw, 7)
    assert done["nfe"] == (2 * len(steps) - 3 if sampler == "theta_trapezoidal" else len(steps) - 1)
    assert _sampled(done["command"], capsys) == done["texts"]


def test_no_text_is_one_gap(server, opened):
    assert len(_ask(server[1])[-1][1]["texts"][0]) == opened.checkpoint.run.config.data.length


def _choices(run, **sampling):
    """What the page offers of a run with other settings of its own."""
    config = dataclasses.replace(run.config, sampling=dataclasses.replace(run.config.sampling, **sampling))
    changed = dataclasses.replace(run, config=config)
    found = {setting.name: setting.choices for setting in requests.settings_of(changed)}
    own = requests.defaults(changed)
    query = urllib.parse.urlencode({name: getattr(own, name) for name in found})
    assert requests.parse(changed, query).settings == own
    return found


def test_the_runs_own_settings_are_offered_and_hide_no_others(opened):
    usual = _choices(opened.checkpoint.run)
    assert _choices(opened.checkpoint.run, sampler="first_hitting") == usual
    assert _choices(opened.checkpoint.run, draw="published") == usual
    assert _choices(opened.checkpoint.run, grid="cosine") == usual
    found = _choices(opened.checkpoint.run, temperature=0.85, corrector_steps=3, grid="1,0.5,0", top_p=0.99)
    for name, own in (("temperature", 0.85), ("corrector_steps", 3), ("grid", "1,0.5,0"), ("top_p", 0.99)):
        assert found.pop(name) == (*usual.pop(name), own)
    assert found == usual


def test_a_corrector_is_offered_where_there_is_a_choice(opened, uniform):
    assert "corrector" not in _choices(opened.checkpoint.run)
    assert _choices(uniform.checkpoint.run)["corrector"] == ("forward_backward", "gibbs", "gibbs:margin:4")
    assert (
        _choices(uniform.checkpoint.run, corrector="gibbs:margin:9", corrector_steps=1)["corrector"][-1]
        == "gibbs:margin:9"
    )


@pytest.mark.slow
def test_uniform_states_show_what_changes(uniform):
    assert "first_hitting" not in requests.settings_of(uniform.checkpoint.run)[0].choices
    with _serving(uniform) as url:
        events = _ask(url, template="a = {20}", num_steps=8)
        steps = [content["samples"][0] for name, content in events if name == "step"]
        assert len(steps) == 9
        texts = ["".join(text for _, text in pieces) for pieces in steps]
        for before, pieces, after in zip(texts[:-1], steps[1:], texts[1:], strict=True):
            marked = "".join(kind[0] * len(text) for kind, text in pieces)
            assert marked.startswith("gggg")
            assert [mark == "n" for mark in marked] == [one != other for one, other in zip(before, after, strict=True)]
        assert texts[-1] == _drawn(uniform, "a = {20}", 0, num_steps=8) == events[-1][1]["texts"][0]
        corrected = {"num_steps": 4, "corrector_steps": 1, "corrector": "gibbs"}
        template = "a = {4:[0-9]+}{2}"
        drawn = _ask(url, template=template, **corrected)[-1][1]["texts"][0]
        assert drawn == _drawn(uniform, template, 0, **corrected)
        assert re.fullmatch("a = [0-9]{4}..", drawn, re.DOTALL)
        first, *_, last = _ask(url, template="{{{2}}}")[-1][1]["texts"][0]
        assert (first, last) == ("{", "}")
        code, message, _ = _refusal(f"{url}/api/draw?sampler=first_hitting")
        assert code == 400
        assert "must be one of tweedie, euler, tau_leaping" in message


@pytest.mark.slow
def test_a_baseline_draws_after_text_and_takes_no_sampler(judge_run, capsys):
    with _serving(requests.open_run(judge_run, None)) as url:
        with urllib.request.urlopen(f"{url}/api/run") as response:
            about = json.load(response)
        assert {setting["name"] for setting in about["settings"]} == {"draw", "num_samples", "temperature", "top_p"}
        done = _ask(url, template=about["example"], seed=3)[-1][1]
        assert done["sampler"] == "autoregressive"
        assert done["nfe"] == 32
        assert _sampled(done["command"], capsys) == done["texts"]
        assert _refusal(f"{url}/api/draw?sampler=tweedie")[:2] == (
            400,
            "an autoregressive run draws one token a step: leave sampler out",
        )
        code, message, _ = _refusal(f"{url}/api/draw?template=%7B4%7Da")
        assert code == 422
        assert "sees no text after a gap" in message


def test_the_example_is_held_out_text_with_a_gap(server, code_run):
    with urllib.request.urlopen(f"{server[1]}/api/run") as response:
        about = json.load(response)
    start, gap, end = re.split(r"\{(\d+)\}", about["example"])
    run = runs.load(code_run)
    text = run.tokenizer.decode(run.split("valid").sequences()[0])
    assert (text[: len(start)], text[-len(end) :]) == (start, end)
    assert len(start) + int(gap) + len(end) == 32
    assert 16 <= int(gap) < 30
    assert (about["unit"], about["length"]) == ("character", 32)
    assert len(_ask(server[1], template=about["example"])[-1][1]["texts"][0]) == 32


@pytest.mark.parametrize("tokenizer", [alphabets.Bytes(), alphabets.Ids(vocab_size=256)], ids=["bytes", "ids"])
def test_pieces_are_the_text_wherever_characters_are_cut(opened, tokenizer):
    run = dataclasses.replace(opened.checkpoint.run, tokenizer=tokenizer)
    row = np.frombuffer("aé☃𝄞, né".encode(), np.uint8).astype(np.int32)
    generator = np.random.default_rng(0)
    for _ in range(200):
        is_given, is_new = generator.random((2, len(row))) < generator.random((2, 1))
        found = pieces.pieces(run, row, is_given, np.where(is_new, run.graph.mask_id, row))
        assert "".join(text for _, text in found) == tokenizer.decode(row)
    masked = np.where(np.arange(len(row)) < 3, run.graph.mask_id, row)
    none = np.zeros(len(row), bool)
    assert pieces.pieces(run, masked, none, masked) == [("mask", "░░░"), ("filled", tokenizer.decode(row[3:]))]


# Many at once


@pytest.mark.slow
def test_64_requests_at_once_are_all_served_and_memory_stays(server, opened):
    process, url = server
    templates = [f"a = {{{1 + seed % 5}}}\nb = {{4}}" for seed in range(64)]

    def request(seed):
        return _ask(url, template=templates[seed], seed=seed, num_steps=3)[-1]

    def resident():
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    sizes, rounds = [], []
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        for _ in range(3):
            rounds.append(list(pool.map(request, range(64))))
            sizes.append(resident())
    assert {name for answers in rounds for name, _ in answers} == {"done"}
    texts = [[content["texts"] for _, content in answers] for answers in rounds]
    assert all(later == texts[0] for later in texts)
    for seed in (0, 1, 31, 62, 63):
        assert texts[0][seed] == [_drawn(opened, templates[seed], seed, num_steps=3)]
    assert len({text for (text,) in texts[0]}) > 32
    # MiB. 15 such rounds grew by 4, all of it in the first six.
    assert sizes[-1] - sizes[0] < 6


@pytest.fixture
def held(opened, monkeypatch):
    """A server of two places whose draws wait at their first step: address, events, who left, and what lets them go."""
    emitted, left, goes_on = [], threading.Semaphore(0), threading.Event()
    real_draw, real_leave = requests.draw, queue.Line.leave

    def draw(opened, request, emit):
        def watched(name, content):
            emitted.append((request.seed, name))
            if name == "step":
                assert goes_on.wait(60)
            emit(name, content)

        real_draw(opened, request, watched)

    def leave(line, place):
        real_leave(line, place)
        left.release()

    monkeypatch.setattr(requests, "draw", draw)
    monkeypatch.setattr(queue.Line, "leave", leave)
    with _serving(opened, max_open=2) as url:
        yield url, emitted, left, goes_on
        goes_on.set()


def _open(url, seed):
    """A connection on which a request has been answered so far as to say its place."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
    connection.request("GET", f"/api/draw?num_steps=8&seed={seed}")
    response = connection.getresponse()
    assert response.readline() == b"event: queued\n"
    return connection, json.loads(response.readline().removeprefix(b"data: "))["ahead"]


def _hang_up(connection):
    connection.sock.close()
    connection.close()


def test_who_hangs_up_is_not_drawn_for(held):
    url, emitted, left, goes_on = held
    drawn, ahead = _open(url, 1)
    assert ahead == 0
    waiting, ahead = _open(url, 2)
    assert ahead == 1
    code, message, headers = _refusal(f"{url}/api/draw?seed=3")
    assert (code, headers["Retry-After"]) == (503, "2")
    assert message == "2 requests are open already: try again in a moment"
    for connection in (waiting, drawn):
        _hang_up(connection)
        assert left.acquire(timeout=60)
    goes_on.set()
    assert _ask(url, seed=4, num_steps=8)[-1][0] == "done"
    assert {seed for seed, _ in emitted} == {1, 4}
    # The event at which it was held is the last.
    assert [name for seed, name in emitted if seed == 1] == ["started", "step"]


def test_nothing_of_a_request_stays(opened):
    with _serving(opened) as url:
        for seed in range(3):
            _ask(url, template=TEMPLATE, seed=seed)
        deadline = time.monotonic() + 60
        while (kept := _places()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert kept == 0


def _places():
    gc.collect()
    return sum(type(thing) is queue.Place for thing in gc.get_objects())


def test_what_goes_wrong_is_told_and_the_next_is_served(opened, monkeypatch, capsys):
    real = generate.draw_samples

    def fail(*arguments, seed, **options):
        if seed == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocation 1")
        return real(*arguments, seed=seed, **options)

    monkeypatch.setattr(generate, "draw_samples", fail)
    with _serving(opened) as url:
        assert _ask(url, seed=1)[-1] == ("error", {"error": "RESOURCE_EXHAUSTED: out of memory"})
        assert _ask(url, seed=2)[-1][0] == "done"
    assert "allocation 1" in capsys.readouterr().err


# What is refused


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        ("steps=3", 400, "'steps' is not a parameter: give some of template, seed, sampler, num_steps"),
        ("num_steps=many", 400, "num_steps='many' must be a whole number from 1 to 4096"),
        ("num_steps=0", 400, "num_steps='0' must be a whole number from 1 to 4096"),
        ("num_steps=4097", 400, "num_steps='4097' must be"),
        ("num_steps=1.5", 400, "num_steps='1.5' must be"),
        ("num_steps=%D9%A3", 400, "num_steps='٣' must be"),
        (f"num_steps={'9' * 5000}", 400, f"num_steps='{'9' * 40}…' must be"),
        ("num_samples=3", 400, "num_samples='3' must be one of 1, 2, 4, 8"),
        ("sampler=ancestral", 400, "sampler='ancestral' must be one of tweedie, euler, tau_leaping"),
        ("draw=", 400, "draw='' must be one of precise, published"),
        ("seed=-1", 400, "seed='-1' must be a whole number from 0 to 2147483647"),
        ("seed=2147483648", 400, "seed='2147483648' must be"),
        ("seed=1&seed=2", 400, "seed is given twice"),
        ("seed", 400, "the request cannot be read, bad query field: 'seed'"),
        ("template=%FF", 400, "the request is not UTF-8"),
        ("template=%7B", 422, "the template has '{' at position 0: a gap is {n} with n tokens to fill"),
        ("template=a%7Bx%7D", 422, "the template has '{x}' at position 1"),
        ("template=%7B33%7D", 422, "the template is 33 tokens long, the model's length is 32"),
        ("template=%7B" + "9" * 5000 + "%7D", 422, "the template has a gap whose length has 5000 digits"),
        ("template=%7B3%7D%C3%A9", 422, "in the text 'é', 'é' (U+00E9) at position 0 is not in the alphabet"),
        ("template=%7B3:[0-9]%2B%7D&draw=published", 422, "draw=published takes no patterns: set it to precise"),
        ("template=%00", 422, "the template holds the character U+0000"),
        ("template=" + "a" * 2**16, 414, "the request is 65545 bytes long, at most 65536 are read"),
    ],
)
def test_a_wrong_request_is_told_why(server, query, code, message):
    found = _refusal(f"{server[1]}/api/draw?{query}")
    assert found[0] == code
    assert found[1].startswith(message)


@pytest.mark.parametrize("names", [[f"{number:x}" for number in range(1000)], ["a"] * 1000], ids=["all", "one"])
def test_many_parameters_take_no_time(monkeypatch, names):
    """They are counted, not compared with each other, while nobody else is answered."""
    compared = []

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

    pairs = [(Name(name), "") for name in names]
    monkeypatch.setattr(requests.urllib.parse, "parse_qsl", lambda *_, **__: pairs)
    with contextlib.suppress(requests.RefusedError):
        requests._parameters("a=")
    assert len(compared) < 10 * len(names)


def test_what_no_server_reads_is_a_4xx(server):
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server[1]).netloc, timeout=60)
    with contextlib.closing(connection):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("GET", "/api/draw?template=" + "a" * 2**21)
        assert connection.getresponse().status == 400


@pytest.mark.parametrize(
    ("path", "method", "headers", "code", "message"),
    [
        ("/", "GET", {"Host": "evil.example"}, 403, "not served under 'evil.example'"),
        ("/api/draw", "GET", {"Host": "127.0.0.1.evil.example:8000"}, 403, "not served under"),
        ("/api/run", "GET", {"Host": "10.0.0.1"}, 403, "not served under '10.0.0.1'"),
        ("/api/draw", "GET", {"Sec-Fetch-Site": "cross-site"}, 403, "another site may not ask"),
        ("/api/draw", "POST", {}, 405, "only GET is answered here"),
        ("/page.html", "GET", {}, 404, "there is nothing at this address"),
    ],
)
def test_other_sites_methods_and_paths_are_refused(server, path, method, headers, code, message):
    found = _refusal(urllib.request.Request(server[1] + path, headers=headers, method=method))
    assert found[0] == code
    assert message in found[1]
    assert found[2]["Content-Security-Policy"].startswith("default-src 'none'")
    assert found[2]["Access-Control-Allow-Origin"] is None


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8000", "[::1]"])
def test_local_names_are_served(server, host):
    with urllib.request.urlopen(urllib.request.Request(server[1], headers={"Host": host})) as response:
        assert b"<title>sedd</title>" in response.read()


def test_where_it_listens_everywhere_any_address_is_its_own(opened):
    def answer(url, host):
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/api/run", headers={"Host": host})
            return connection.getresponse().status

    with _serving(opened, host="0.0.0.0") as url:
        assert [answer(url, host) for host in ("10.0.0.1:8000", "[fe80::1]", "evil.example")] == [200, 200, 403]
    with _serving(opened, host="here.example") as url:
        assert [answer(url, host) for host in ("here.example:8000", "10.0.0.1")] == [200, 403]


# The command


def test_a_port_in_use_is_one_line(server, code_run, capsys):
    port = urllib.parse.urlsplit(server[1]).port
    assert cli.main(["serve", f"--workdir={code_run}", f"--port={port}"]) == 1
    assert capsys.readouterr().err == (
        f"sedd serve: cannot listen at --host=127.0.0.1 --port={port}, Address already in use: "
        "give another --port, or 0 for any that is free\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--port=70000"], 1, "--port=70000 is not a port: give one from 1 to 65535"),
        (
            ["--host=no.such.name.invalid", "--port=0"],
            1,
            "--host=no.such.name.invalid is not an address of this machine",
        ),
        ([f"--host={'a' * 300}", "--port=0"], 1, "is not an address of this machine: give one, or a name of it"),
        (["--host=192.0.2.1", "--port=0"], 1, "cannot listen at --host=192.0.2.1 --port=0, "),
        (["--step=1", "--port=0"], 1, "--step=1 has no checkpoint in"),
        (["--prot=1"], 2, "prot"),
    ],
)
def test_wrong_arguments_are_one_line(code_run, capsys, arguments, code, message):
    assert cli.main(["serve", f"--workdir={code_run}", *arguments]) == code
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(code_run, capsys, monkeypatch):
    monkeypatch.delattr(sedd_jax.serving, "app")
    monkeypatch.delitem(sys.modules, "sedd_jax.serving.app")
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert cli.main(["serve", f"--workdir={code_run}"]) == 1
    assert "pip install 'sedd_jax[serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_it_while_it_draws(code_run):
    process, url = _start(code_run, "--host=localhost")
    with process:
        assert url.startswith("http://localhost:")
        with urllib.request.urlopen(f"{url}/api/draw?num_steps=4096", timeout=60) as response:
            while not response.readline().startswith(b'data: {"taken"'):
                pass
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130


# The page


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
    with playwright.sync_playwright() as tools:
        launched = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser):
    """An empty page; nothing in it may fail unseen."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(60_000)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    assert errors == []


def _draw(page, count=1):
    page.click("#draw")
    page.locator(".copy:visible").nth(count - 1).wait_for()


def _shown(page, kind, column=0):
    return "".join(page.locator(".column").nth(column).locator(f"pre .{kind}").all_text_contents())


@pytest.mark.slow
def test_the_page_fills_a_gap_and_goes_back(server, page, opened):
    page.goto(server[1])
    page.fill("#template", TEMPLATE)
    page.fill("#seed", "5")
    page.get_by_label("Steps").fill("8")
    _draw(page)
    text = _drawn(opened, TEMPLATE, 5, num_steps=8)
    assert page.locator("pre").all_text_contents() == [text]
    assert _shown(page, "given") == "a = \nb = \na"
    assert len(_shown(page, "filled") + _shown(page, "new")) == 9
    assert page.locator(".state").text_content().startswith("9 network evaluations, ")
    slider, where = page.get_by_label("Step of the trajectory"), page.locator("output")
    assert where.text_content() == "step 9 of 9"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert where.text_content() == "step 8 of 9"
    slider.fill("0")
    assert where.text_content() == "step 0 of 9"
    assert _shown(page, "given") == "a = \nb = \na"
    assert _shown(page, "mask") == "_" * 9
    assert _shown(page, "filled") + _shown(page, "new") == ""
    slider.fill("9")
    assert page.locator("pre").all_text_contents() == [text]


@pytest.mark.slow
def test_a_link_brings_two_samplers_back_side_by_side(server, page, browser, opened, capsys):
    page.goto(server[1])
    page.fill("#template", TEMPLATE)
    page.click("#add")
    page.get_by_label("Sampler").nth(1).select_option("theta_trapezoidal")
    page.get_by_label("Steps").nth(1).fill("3")
    _draw(page, 2)
    texts = [page.locator(".column").nth(column).locator("pre").all_text_contents() for column in range(2)]
    assert [len(column) for column in texts] == [1, 1]
    boxes = [page.locator(".column").nth(column).bounding_box() for column in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    page.locator(".copy").nth(1).click()
    page.locator(".copy", has_text="Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    assert "--sampler=theta_trapezoidal --num_steps=3" in command
    assert _sampled(command, capsys) == texts[1]
    page.click("#link")
    page.locator("#link", has_text="Copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    page.goto("about:blank")
    page.goto(link)
    page.locator(".copy:visible").nth(1).wait_for()
    assert page.input_value("#template") == TEMPLATE
    assert [field.input_value() for field in page.get_by_label("Sampler").all()] == ["tweedie", "theta_trapezoidal"]
    assert [field.input_value() for field in page.get_by_label("Steps").all()] == ["4", "3"]
    assert [page.locator(".column").nth(n).locator("pre").all_text_contents() for n in range(2)] == texts
    page.get_by_label("Remove this column").nth(0).click()
    assert page.get_by_label("Sampler").input_value() == "theta_trapezoidal"


@pytest.mark.slow
def test_the_page_says_what_is_wrong_and_recovers(server, browser):
    with contextlib.closing(browser.new_page()) as page:  # Chromium itself counts a 4xx as an error.
        page.goto(f"{server[1]}/#template=a%7B40%7D&column=sampler%3Dancestral")
        page.get_by_text("sampler='ancestral' must be one of tweedie").wait_for()
        page.get_by_label("Sampler").select_option("tweedie")
        page.click("#draw")
        page.get_by_text("the template is 41 tokens long, the model's length is 32").wait_for()
        page.fill("#template", "a = {4}")
        _draw(page)
        assert page.get_by_role("alert").all_text_contents() == [""] * page.get_by_role("alert").count()


@pytest.mark.slow
def test_closing_the_page_stops_the_draw(held, page, browser):
    url, emitted, left, goes_on = held
    page.goto(url)
    page.fill("#seed", "1")
    page.click("#draw")
    while (1, "step") not in emitted:  # Until then the page may say that it waits, compiles or draws.
        time.sleep(0.01)
    page.click("#stop")
    assert left.acquire(timeout=60)
    page.locator(".state", has_text="stopped").wait_for()
    page.fill("#seed", "2")
    page.click("#draw")
    page.locator(".state", has_text="next").wait_for()
    page.close()
    assert left.acquire(timeout=60)
    goes_on.set()
    assert _ask(url, seed=3)[-1][0] == "done"
    assert {seed for seed, _ in emitted} == {1, 3}
    assert (1, "done") not in emitted


@pytest.mark.slow
def test_nothing_is_typed_before_the_run_is_known(server, page):
    held = []
    page.route("**/api/run", lambda route: held.append(route))  # playwright sets attributes on what it is given
    with page.expect_request("**/api/run"):
        page.goto(server[1])
    assert all(page.locator(name).is_disabled() for name in ("#template", "#seed", "#draw"))
    held[0].continue_()
    page.fill("#template", TEMPLATE)
    assert page.input_value("#template") == TEMPLATE


@pytest.mark.slow
def test_text_is_no_markup(uniform, page):
    with _serving(uniform) as url:
        page.goto(url)
        page.fill("#template", "<img src=x onerror=alert(1)>{2}")
        _draw(page)
        assert _shown(page, "given") == "<img src=x onerror=alert(1)>"
        assert page.locator("img").count() == 0


@pytest.mark.slow
def test_a_narrow_page_stands_below_itself(server, page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(server[1])
    page.click("#add")
    page.get_by_label("Sampler").nth(1).select_option("tweedie")
    _draw(page, 2)
    boxes = [page.locator(".column").nth(column).bounding_box() for column in range(2)]
    assert boxes[0]["y"] + boxes[0]["height"] < boxes[1]["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_device_without_memory_is_one_line_on_the_page_and_nothing_in_the_terminal(opened, monkeypatch, capfd):
    def fails(*arguments, **named):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5242880 bytes.\nmore")

    monkeypatch.setattr(generate, "draw_samples", fails)
    with _serving(opened) as url:
        name, content = _ask(url, template=TEMPLATE, num_steps=4)[-1]
    assert name == "error"
    assert content["error"].startswith("out of device memory (another 5242880 bytes were asked for): ask for fewer")
    assert "Traceback" not in capfd.readouterr().err


# Other names, and connections without a request


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("name", ["lab.example.com", "Lab_2.example", "fe80::1"])
def test_the_remedy_for_another_name_works_as_it_stands(opened, host, name):
    asked = f"[{name}]:8123" if ":" in name else f"{name}:8123"
    with _serving(opened, host="127.0.0.1") as url:
        status, said = _answer(url, asked)
    assert status == 403
    (remedy,) = re.findall(r"--allowed_host=(\S+) to `sedd serve`", said)
    with _serving(opened, host=host, allowed_hosts=["other", remedy]) as url:
        assert _answer(url, asked)[0] == 200
        assert _answer(url, "other")[0] == 200
        assert _answer(url, "evil.example")[0] == 403


def test_a_name_that_no_flag_can_take_is_not_proposed(opened):
    with _serving(opened) as url:
        status, said = _answer(url, "a b`c")
    assert status in (400, 403)
    assert "--allowed_host" not in said


@pytest.mark.parametrize(
    "name", slow.all_but(["a,b"], ["http://lab.example.com", "lab.example.com:8000", "a,b", "", "*"])
)
def test_an_allowed_host_that_is_no_name_is_refused_at_once(code_run, name, capsys):
    assert cli.main(["serve", f"--workdir={code_run}", "--allowed_host=good", f"--allowed_host={name}"]) == 1
    assert f"--allowed_host={name or repr(name)} is not a name alone: give what stands" in capsys.readouterr().err


@contextlib.contextmanager
def _idle(url, number):
    """Connections that have sent a part of a request."""
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(number)]
        for connection in found:
            connection.sendall(b"GET / HTTP/1.1\r\n")
        yield found


@pytest.mark.slow
def test_requests_that_never_end_give_way_to_those_that_do(opened, monkeypatch):
    monkeypatch.setattr(connections, "MAX_UNFINISHED", 4)
    with _serving(opened) as url, _idle(url, 12) as idle:
        for _ in range(3):
            assert _answer(url, "localhost")[0] == 200
        gone = sum(_is_closed(connection) for connection in idle[:8])
    assert gone == 8


@pytest.mark.slow
def test_a_request_has_a_time_to_come_and_none_to_be_answered(opened, monkeypatch):
    monkeypatch.setattr(connections, "_SECONDS", 0.2)
    with _serving(opened) as url, _idle(url, 1) as (idle,):
        assert _is_closed(idle)
        assert _ask(url, template=TEMPLATE, num_steps=512)[-1][0] == "done"


def _is_closed(connection):
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_a_request_that_is_being_read_counts_as_open(opened, monkeypatch):
    """Reading compiles patterns, which may take seconds."""
    begun, goes_on, real = threading.Semaphore(0), threading.Event(), requests.parse

    def parse(run, query):
        if "seed=1" in query:
            begun.release()
            assert goes_on.wait(60)
        return real(run, query)

    monkeypatch.setattr(requests, "parse", parse)
    with _serving(opened, max_open=2) as url, concurrent.futures.ThreadPoolExecutor() as pool:
        slow = [pool.submit(_ask, url, seed=1, num_steps=1) for _ in range(2)]
        assert all(begun.acquire(timeout=60) for _ in slow)
        code, _, _ = _refusal(f"{url}/api/draw?seed=3&num_steps=1")
        goes_on.set()
        assert code == 503
        assert [answers.result()[-1][0] for answers in slow] == ["done", "done"]
