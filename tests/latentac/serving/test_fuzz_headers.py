"""Requests whose first line, headers and framing no client library sends, byte by byte to a real server."""

import json
import re
from dataclasses import dataclass

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from latentac.serving.connections import HEADER_BYTES
from latentac.serving.process import ServerProcess
from tests.latentac.serving.fuzzing import counted, faults, fuzzed
from tests.latentac.serving.wire import LAST, Answer, answers_in, requests_in, said

pytestmark = [pytest.mark.slow, pytest.mark.fuzz, pytest.mark.timeout(3600)]

PREDICT = b"/v1/models/latentac:predict"
DRAWN = b'{"instances": [{"prompt": "a red circle", "num_steps": 2}]}'
WRONG = b'{"instances": [{"prompt": 1}]}'

FINE, REFUSED, EITHER = "fine", "refused", "either"


@dataclass(frozen=True)
class Part:
    """Lines of a request. meant: how a strict parser is told of them, where this server may read them more kindly than
    it; verdict: FINE changes nothing about the answer, REFUSED makes it one of the 400s."""

    lines: bytes
    verdict: str = EITHER
    meant: bytes | None = None


def _fine(*lines: bytes) -> list[Part]:
    return [Part(line, FINE) for line in lines]


def _refused(*lines: bytes) -> list[Part]:
    return [Part(line, REFUSED) for line in lines]


_token = st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=30).map(str.encode)
_visible = st.binary(max_size=60).map(lambda raw: bytes(byte for byte in raw if byte not in b"\0\r\n\x0b\x0c"))
_any = st.binary(max_size=60)

HOSTS = [
    *_fine(b"Host: localhost", b"Host:localhost", b"host: 127.0.0.1:1", b"HOST: [::1]:8080", b"Host: LOCALHOST.:80"),
    *_fine(b"Host: a.localhost", b"Host: 127.9.9.9"),
    *_refused(b"", b"Host:", b"Host: evil.example", b"Host: localhost@evil.example", b"Host: localhost:1@evil.example"),
    *_refused(b"Host: [::1]evil.example", b"Host: [::1", b"Host: localhost, evil.example", b"Host: localhost evil"),
    *_refused(b"Host: http://localhost", b"Host: localhost/", b"Host: localhost:80:80", b"Host: localhost:x"),
    *_refused(b"Host: localhost\r\nHost: evil.example", b"Host: localhost\r\nHost: localhost", b"Host : localhost"),
    *_refused(
        b"Host: \xff", b"Host: localhost\0", b"Host: 127.0.0.1.evil.example", b"Host: 2130706433", b"Host: 0x7f.1"
    ),
    *_refused(b"Host: [::ffff:10.0.0.1]", b"Host: 0.0.0.0"),
]
ORIGINS = [
    *_fine(b""),
    *_refused(b"Origin: null", b"Origin:", b"Origin: https://evil.example", b"Origin: localhost", b"Origin: \xff"),
    *_refused(b"Origin: http://localhost http://evil.example", b"Origin: http://localhost, http://evil.example"),
    *_refused(b"Origin: http://evil.example\r\nOrigin: http://localhost", b"Origin: http://user@localhost"),
    *_refused(b"Origin: evil://localhost", b"Origin: http://localhost/", b"Origin: http://localhost.evil.example"),
    *_refused(b"Origin: chrome-extension://abcdefgh", b"Origin: file://", b"Origin: http://localhost:99999"),
]
KINDS = [
    *_fine(b"Content-Type: application/json", b"content-type:APPLICATION/JSON", b"Content-Type: application/json; a=b"),
    *_fine(b"Content-Type: application/json;charset=utf-16", b"Content-Type: application/json;;;"),
    *_refused(b"", b"Content-Type:", b"Content-Type: text/plain", b"Content-Type: multipart/form-data; boundary=x"),
    *_refused(b"Content-Type: application/x-www-form-urlencoded", b"Content-Type: text/plain; application/json"),
    *_refused(b"Content-Type: application/jsonx", b"Content-Type: application/json, text/plain", b"Content-Type: \xff"),
    *_refused(b"Content-Type: text/plain\r\nContent-Type: application/json", b"Content-Type: application / json"),
    *_refused(b"Content-Type: application/json\r\nContent-Type: text/plain"),
]
CODINGS = [
    *_fine(b"", b"Content-Encoding: identity", b"Content-Encoding:"),
    *_refused(
        b"Content-Encoding: br", b"Content-Encoding: gzip, gzip", b"Content-Encoding: \xff", b"Content-Encoding: gzip"
    ),
    *_refused(b"Content-Encoding: identity\r\nContent-Encoding: identity", b"Content-Encoding: deflate"),
]
FREE = st.one_of(
    st.sampled_from(
        [
            # The strict parser takes what follows an upgrade for another protocol.
            Part(b"Connection: keep-alive, Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk", FINE, b"X: a"),
            Part(b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13", FINE, b"X: a"),
            *_fine(b"Expect: banana", b"Upgrade: websocket", b"Connection: Upgrade"),
            *_fine(b"Authorization: Basic \xff", b"Authorization:", b"Authorization: Bearer " + b"a" * 5000),
            *_fine(
                b"X-Forwarded-Host: evil.example", b"X-Forwarded-For: 1.2.3.4", b"Range: bytes=0-1", b"TE: trailers"
            ),
            *_fine(b"X-HTTP-Method-Override: DELETE", b"Cookie: " + b"a=b; " * 1000, b"If-None-Match: *"),
            *_fine(*(b"X-Request-Id: " + each for each in (b"abc", b"\xff", b"a" * 129, b"a b", b"..", b"<b>"))),
            Part(b"X-Request-Id: \x1b[31m", FINE, b"X: a"),
            *_fine(b"\r\n".join(b"X-%d: y" % number for number in range(900)), b"A" * 2000 + b": " + b"b" * 20_000),
            *_refused(
                b"A" * 70_000 + b": b",
                b"X: " + b"a" * 70_000,
                b"\r\n".join(b"X%d: y" % number for number in range(9000)),
            ),
            *_refused(
                b"Authorization: a\r\nAuthorization: b", b"NoColon", b": nameless", b"X: a\0b", b"X\0: a", b"X Y: a"
            ),
            *_refused(b"X\xff: a", b"(): a", b"X: a\rb", b"\x16\x03\x01: a"),
            Part(b"X: a\r\n b", FINE, b"X: a b"),
            Part(b"X: a\n\tb", FINE, b"X: a b"),
            Part(b"X: a\nY: b", FINE, b"X: a\r\nY: b"),
            Part(b"X: \x01\x1b", FINE, b"X: a"),
        ]
    ),
    st.builds(lambda name, value: Part(b"X" + name + b": " + value, EITHER, b"X: a"), _token, _visible),
    st.builds(lambda name, value: Part(name + b":" + value), _any, _any),
    _any.map(Part),
)
METHODS = st.sampled_from([b"POST"] * 12 + [b"GET", b"PUT", b"OPTIONS", b"TRACE", b"DELETE"])
ODD_LINES = [
    *_refused(
        b"POST " + PREDICT, b"POST " + PREDICT + b" HTTP/2.0", b"POST " + PREDICT + b" HTTP/9.9", b"GET /", b"GET"
    ),
    *_refused(
        b"POST  " + PREDICT + b" HTTP/1.1", b" POST " + PREDICT + b" HTTP/1.1", b"POST\t" + PREDICT + b"\tHTTP/1.1"
    ),
    *_refused(
        b"POST " + PREDICT + b" HTTP/1.1 ",
        b"POST " + PREDICT + b" http/1.1",
        b"POST /\xff HTTP/1.1",
        b"\0",
        b"PRI * HTTP/2.0",
    ),
    *_refused(
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xab" * 500, b"POST /" + b"a" * 70_000 + b" HTTP/1.1"
    ),
    *_refused(b"POST * HTTP/1.1", b"CONNECT localhost:80 HTTP/1.1", b"POST //evil.example" + PREDICT + b" HTTP/1.1"),
    *_refused(
        b"POST /v1/models/%2e%2e:predict HTTP/1.1", b"POST /page/.." + PREDICT + b" HTTP/1.1", b"POST /%ff%00 HTTP/1.1"
    ),
    Part(b"FOO " + PREDICT + b" HTTP/1.1", REFUSED, b"PUT " + PREDICT + b" HTTP/1.1"),
    Part(b"post " + PREDICT + b" HTTP/1.1", REFUSED, b"PUT " + PREDICT + b" HTTP/1.1"),
    Part(b"\r\nPOST " + PREDICT + b" HTTP/1.1"),
    Part(b"POST " + PREDICT + b"?a=\x7e&b HTTP/1.1", FINE),
    Part(b"POST //v1//models/latentac:predict/ HTTP/1.1", FINE),
    Part(b"POST http://localhost" + PREDICT + b" HTTP/1.1", EITHER),
    Part(b"POST http://evil.example" + PREDICT + b" HTTP/1.1", REFUSED),
    Part(b"POST " + PREDICT + b" HTTP/1.0", FINE),
]


def _chunked(body: bytes, *, size: bytes = b"%x", behind: bytes = b"", end: bytes = b"0\r\n\r\n") -> bytes:
    return size % len(body) + behind + b"\r\n" + body + b"\r\n" + end


def _framings(body: bytes) -> list[Part]:
    """Ways to say how long a body is, each with the body behind it."""
    length, chunks = b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked"

    def whole(verdict: str, *lines: bytes, content: bytes = body, meant: bytes | None = None) -> Part:
        return Part(b"\r\n".join(lines) + b"\r\n\r\n" + content, verdict, meant)

    plain = whole(FINE, length).lines
    fine = [
        whole(FINE, length),
        whole(FINE, b"content-length:\t%d " % len(body)),
        whole(FINE, chunks, content=_chunked(body)),
        whole(FINE, b"transfer-encoding: CHUNKED", content=_chunked(body)),
        whole(FINE, chunks, content=_chunked(body, behind=b";a=b;c")),
        whole(FINE, chunks, content=_chunked(body, size=b"000%X")),
        whole(FINE, chunks, content=_chunked(body, end=b"0\r\nX: y\r\nHost: evil.example\r\n\r\n")),
        whole(FINE, chunks, content=b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"),
        whole(FINE, length, length, meant=plain),
        whole(FINE, b"Content-Length: %d, %d" % (len(body), len(body)), meant=plain),
        whole(FINE, chunks, content=_chunked(body, behind=b"  "), meant=plain),
        whole(FINE, length, b"Expect: 100-continue"),
        whole(FINE, length, b"Expect: 100-CONTINUE"),
    ]
    damaged = [
        ([length, chunks], body),
        ([length, chunks], _chunked(body)),
        ([chunks, b"Content-Length: 0"], _chunked(body)),
        ([b"Content-Length: 0", length], body),
        ([length, b"Content-Length: 0"], body),
        *(
            ([b"Content-Length: " + each], body)
            for each in (b"-1", b"+5", b"0x5", b"5 5", b"5,6", b"1e2", b"1_0", b"", b"\xb2")
        ),
        ([b"Content-Length: " + b"9" * 30], body),
        ([chunks, chunks], _chunked(body)),
        *(
            ([b"Transfer-Encoding: " + each], _chunked(body))
            for each in (
                b"gzip, chunked",
                b"chunked, gzip",
                b"identity",
                b"xchunked",
                b"chunked\x0b",
                b'"chunked"',
                b"",
                b"chunked;a=b",
            )
        ),
        *(([chunks], _chunked(body, size=each)) for each in (b"zz%x", b"-%x", b"+%x", b"0x%x", b" %x", b"%x_0")),
        ([chunks], _chunked(body, size=b"1%x")),
        ([chunks], _chunked(body + b"abc", size=b"0%.0dff")),
        ([chunks], b"f" * 21 + b"\r\n" + body),
        ([chunks], _chunked(body, end=b"0\r\nNo colon\r\n\r\n")),
        ([chunks], _chunked(body, end=b"0\r\nX: \0\r\n\r\n")),
        ([chunks], body),
        ([b"Transfer_Encoding: chunked"], _chunked(body)),
        ([b"Transfer-Encoding : chunked"], _chunked(body)),
        ([b"Content-Length : 5"], body),
        ([], body),
    ]
    return fine + [whole(REFUSED, *lines, content=content) for lines, content in damaged]


@dataclass(frozen=True)
class Case:
    """Bytes to send; meant: for the strict parser; verdict: of the first answer."""

    sent: bytes
    meant: bytes
    verdict: str
    method: str
    drawn: bool


def _kindly(head: bytes) -> bytes:
    """As the standard lets a server read it: a folded header is one line, a bare LF ends one, and other control
    characters are kept. The strict parser takes none of these."""
    head = re.sub(rb"\r?\n[ \t]+", b" ", re.sub(rb"(?<!\r)\n", b"\r\n", head))
    return re.sub(rb"[\x01-\x08\x0e-\x1f\x7f]", b"a", head)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Mostly one thing is odd about a request, so that a refusal is for what it says; sometimes several are."""
    body = draw(st.sampled_from([DRAWN, WRONG]))
    framings = _framings(body)
    line = Part(draw(METHODS) + b" " + PREDICT + b" HTTP/1.1", FINE)
    parts = {"line": line, "host": HOSTS[0], "origin": ORIGINS[0], "kind": KINDS[0], "coding": CODINGS[0]}
    parts |= {"free": Part(b"", FINE), "framing": framings[0]}
    table = {"line": ODD_LINES, "host": HOSTS, "origin": ORIGINS, "kind": KINDS, "coding": CODINGS, "framing": framings}
    for name in draw(st.lists(st.sampled_from(sorted(parts)), min_size=1, max_size=3, unique=True)):
        parts[name] = draw(FREE if name == "free" else st.sampled_from(table[name]))
    order = [
        parts["line"],
        *draw(st.permutations([parts[name] for name in ("host", "origin", "kind", "coding", "free")])),
    ]
    head = [part for part in order if part.lines or part is parts["line"]]
    sent = b"".join(part.lines + b"\r\n" for part in head) + parts["framing"].lines
    meant = b"".join((part.lines if part.meant is None else part.meant) + b"\r\n" for part in head)
    meant = _kindly(meant)
    meant += parts["framing"].lines if parts["framing"].meant is None else parts["framing"].meant
    verdicts = {part.verdict for part in parts.values()}
    verdict = REFUSED if REFUSED in verdicts else EITHER if EITHER in verdicts else FINE
    method = parts["line"].lines.strip().partition(b" ")[0].decode("latin-1")
    return Case(sent + LAST, meant + LAST, verdict, method, body == DRAWN)


def assert_form(answer: Answer) -> None:
    """Of one answer: no fault of the server, nothing of the caller's in its headers, and a reason in words."""
    assert 200 <= answer.status < 500, answer
    for name, value in answer.headers:
        assert value.isprintable(), (name, value)
        assert value.isascii(), (name, value)
    given = answer.header("x-request-id")
    assert not given or re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII), given
    if answer.status < 400 or not answer.body:
        return
    if answer.header("content-type").startswith("application/json"):
        content = json.loads(answer.body)
        assert content["error"]
        assert content["problems"]
        assert len(answer.body) < 20_000
    else:  # it was no HTTP: there is no route whose form it could have
        assert answer.body == b"Invalid HTTP request received."
        assert (answer.status, answer.header("connection")) == (400, "close")


@fuzzed(4.0)
@given(case=cases())
def test_whatever_a_request_looks_like_it_has_one_answer(small: ServerProcess, case: Case) -> None:
    """As many answers as a strict parser finds requests, at most one more for what it stops at, and that one refuses.
    What must be refused is, and what is harmless is answered as if it were not there."""
    note(f"{case.sent[:2000]!r} {case.sent[-500:]!r}")
    whole, stopped = requests_in(case.meant)
    waits = not stopped and whole < 2  # for more of a body, in which the last request has vanished
    answers = answers_in(said(small, case.sent, half_closed=waits))
    counted("headers", [answer.status for answer in answers], connections=1, requests=int(not answers))
    about = (case.sent[:300], whole, stopped, answers)
    for answer in answers:
        assert_form(answer)
    assert len(answers) <= whole + (bool(stopped) or waits), about  # one that has not arrived may be refused early
    if len(answers) > whole:
        assert answers[-1].status >= 400, about
    if len(answers) < whole and not waits:  # this server is stricter, and says so
        assert answers or len(case.sent) > HEADER_BYTES, about  # a reset may overtake the refusal of what is long
        assert all((answer.status >= 400, answer.header("connection")) == (True, "close") for answer in answers[-1:]), (
            about
        )
    if case.verdict == REFUSED and answers:
        assert answers[0].status >= 400, about
    if case.verdict == FINE and not stopped:
        posted = case.method == "POST"
        assert answers[0].status in ((200 if case.drawn else 422,) if posted else (200, 403, 404, 405)), about
        assert not posted or answers[0].header("x-request-id"), about


@fuzzed()
@given(
    data=st.lists(
        st.binary(max_size=200)
        | st.sampled_from([b"\r\n", b"\r\n\r\n", b"GET / HTTP/1.1\r\n", b"Host: localhost\r\n", LAST]),
        max_size=8,
    )
)
def test_any_bytes_are_answered_or_refused(small: ServerProcess, data: list[bytes]) -> None:
    """Of no form at all: the answers are HTTP, and none is a fault."""
    answers = answers_in(said(small, b"".join(data), half_closed=True))
    counted("headers", [answer.status for answer in answers], connections=1, requests=int(not answers))
    for answer in answers:
        assert_form(answer)


def test_the_server_has_noticed_no_fault_of_its_own(small: ServerProcess) -> None:
    """After all requests of this module: no traceback, no error, no answer of the 500s in its log."""
    assert faults(small) == []
