from __future__ import annotations

import math

import pytest
import yaml

from tproxyd.config import document
from tproxyd.config.document import MAX_DEPTH, Entries, Items, Leaf, plain, read_document, resolve


def value_of(text: str | bytes):
    read = read_document(text.encode() if isinstance(text, str) else text)
    assert read.problems == ()
    return plain(read.root)


def problems_of(data: str | bytes) -> list[str]:
    read = read_document(data.encode() if isinstance(data, str) else data)
    return [f"{at.line}:{at.column}: {text}" for at, text in read.problems]


@pytest.fixture(params=["CSafeLoader", "SafeLoader"])
def either_parser(request, monkeypatch):
    monkeypatch.setattr(document, "_LOADER", getattr(yaml, request.param))


# Core schema


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("Null", None),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("0", 0),
        ("-19", -19),
        ("+7", 7),
        ("007", 7),
        ("0o14", 12),
        ("0xC", 12),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("12e03", 12000.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
)
def test_core_schema_scalars_are_resolved(text, value):
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


def test_nan_is_a_number():
    assert math.isnan(resolve(".nan"))


@pytest.mark.parametrize(
    "text",
    [
        "off",
        "yes",
        "no",
        "on",
        "y",
        "22:22",
        "1_000",
        "2001-01-01",
        "nULL",
        "tRUE",
        "0b1",
        "0o8",
        "0xg",
        "1e",
        ".",
        "+",
        "-",
        "-0x1",
        "+.nan",
        "0x1/0x1",
        "10.0.0.0/8",
        "٣",
        "1 000",
        "1-2",
        "5s",
    ],
)
def test_what_only_yaml_1_1_would_convert_stays_text(text):
    assert resolve(text) == text


def test_quoted_scalars_are_text():
    assert value_of("a: '5'\nb: \"true\"\nc: ''\nd: |\n  5\n") == {"a": "5", "b": "true", "c": "", "d": "5\n"}


def test_a_number_that_nobody_needs_is_a_problem():
    assert problems_of("a: " + "1" * 65) == ["1:4: a number of 65 characters; no number here needs as many"]


# Positions


def test_every_key_and_value_knows_its_place(either_parser):
    root = read_document("# x\nä: [b,\n  {c: d}]\ne:\n".encode()).root
    assert isinstance(root, Entries)
    first, last = root.entries["ä"], root.entries["e"]
    assert (root.position, first.key, last.key) == ((2, 1), (2, 1), (4, 1))
    assert isinstance(first.node, Items)
    b, mapping = first.node.items
    assert (first.node.position, b.position, mapping.position) == ((2, 4), (2, 5), (3, 3))
    assert isinstance(mapping, Entries)
    assert (mapping.entries["c"].key, mapping.entries["c"].node) == ((3, 4), Leaf((3, 7), "d"))
    assert last.node == Leaf((4, 3), None)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_all_line_ends_count(line_end):
    root = read_document(f"a: 1{line_end}{line_end}b: 2".encode()).root
    assert isinstance(root, Entries)
    assert root.entries["b"].key == (3, 1)
    assert problems_of(f"a: 1{line_end}{line_end}b: \x01") == ["3:4: control character U+0001; remove it"]


# Text


def test_a_utf_8_bom_is_passed_over():
    assert value_of(b"\xef\xbb\xbfa: 1") == {"a": 1}
    assert problems_of(b"\xef\xbb\xbfa: \x00")[0].startswith("1:4: ")
    assert problems_of(b"\xef\xbb\xbfa: \xff")[0].startswith("1:4: ")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("a: 1".encode("utf-16"), "1:1: the file is UTF-16 or UTF-32; save it as UTF-8"),
        ("a: 1".encode("utf-32"), "1:1: the file is UTF-16 or UTF-32; save it as UTF-8"),
        ("a: 1".encode("utf-16-le"), "1:2: control character U+0000; is the file UTF-16? save it as UTF-8"),
        ("# ä\na: ö".encode("latin-1"), "1:3: byte 0xe4 is not UTF-8; save the file as UTF-8"),
        (b"a: 1\nb: \xc3", "2:4: byte 0xc3 is not UTF-8; save the file as UTF-8"),
        (b"a: \xed\xa0\x80", "1:4: byte 0xed is not UTF-8; save the file as UTF-8"),
        (b"a: 1\n\x1b: 2", "2:1: control character U+001B; remove it"),
        (b"a: \x7f", "1:4: control character U+007F; remove it"),
        ("a: ö\u0085b: 2".encode(), "1:5: control character U+0085; remove it"),
        ("a: \u2028".encode(), "1:4: control character U+2028; remove it"),
        ("a: \ufeff".encode(), "1:4: control character U+FEFF; remove it"),
    ],
)
def test_what_is_not_plain_utf_8_text_is_one_clear_problem(data, problem):
    assert problems_of(data) == [problem]
    assert read_document(data).root is None


# Syntax


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: b: c", "1:5: YAML syntax: a second ': ' in a line; quote text that has it"),
        ("a:\n\t- b", "2:1: YAML syntax: a tab can't indent; use spaces"),
        ("a: @x", '1:4: YAML syntax: a value can\'t begin with "@"; quote the text'),
        ("a: [*]", "1:6: YAML syntax: quote text that begins with '*' or '&'"),
        ("a: [::1]", "1:5: YAML syntax: no value here; quote text that begins or ends with ':'"),
        ("a: [2001:db8::]", "1:14: YAML syntax: a ':' ends a key; quote text that ends with it"),
        ("a: [1\nb: 2", "2:2: YAML syntax: the list is not closed; ',' or ']' is missing before this"),
        ("a: {b: c\n", "2:1: YAML syntax: the mapping is not closed; ',' or '}' is missing before this"),
        ("a: 'b\n", "2:1: YAML syntax: the file ends inside quoted text; the closing quote is missing"),
        ("a: - b", "1:4: YAML syntax: a list item ('- ') needs a line of its own"),
        ("- a\nb: c", "2:1: YAML syntax: no '- ' where a list item should be; look at the indentation"),
        ("a: 'x' y", "1:8: YAML syntax: no key where one should be; look at indentation and quotes before this"),
        ("a: 1\nb\n", "3:1: YAML syntax: ':' is missing after the key"),
        ('a: "\\q"', "1:5: YAML syntax: unknown escape after a backslash; single quotes take text literally"),
        ("a: 1\n...\nb: 2", "3:1: YAML syntax: text after the end of the document ('...'); remove it"),
    ],
)
def test_a_syntax_error_is_said_plainly_with_its_place(text, problem):
    assert problems_of(text) == [problem]


def test_problems_before_a_syntax_error_are_kept():
    assert [line[:4] for line in problems_of("a: 1\na: 2\nb: 'x")] == ["2:1:", "3:6:"]


# What is not used here


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", '3:1: key "a" is there twice, first at 1:1; remove one'),
        ("{a: 1, 'a': 3}", '1:8: key "a" is there twice, first at 1:2; remove one'),
        ("a: *x", "1:4: aliases (*name) are not used here; write the value out"),
        ("a: &x 5", "1:4: anchors (&name) are not used here; remove it"),
        ("a: &x {b: 1}", "1:4: anchors (&name) are not used here; remove it"),
        ("&x a: 1", "1:1: anchors (&name) are not used here; remove it"),
        ("a:\n  <<: {b: 1}", "2:3: merge keys (<<) are not used here; write the keys out"),
        ("a: !!python/object:os.system x", "1:4: tags (!...) are not used here; remove it, quote what is to be text"),
        ("a: !!str 5", "1:4: tags (!...) are not used here; remove it, quote what is to be text"),
        ("a: !x [b]", "1:4: tags (!...) are not used here; remove it, quote what is to be text"),
        ("5: x", "1:1: a key must be text, found 5; quote it"),
        ("true: x", "1:1: a key must be text, found true; quote it"),
        ("~: x", "1:1: a key must be text, found nothing; write it as text"),
        ("? [a, b]\n: x", "1:3: a key must be text, found a list; write it as text"),
        ("? {a: b}\n: x", "1:3: a key must be text, found a mapping; write it as text"),
        ("a: 1\n---\nb: 2", "2:1: a second YAML document ('---'); put everything into one"),
        ("%YAML 1.1\n---\na: 1", "1:1: directives (%YAML, %TAG) are not used here; remove the line"),
        ("%TAG ! tag:x,2000:\n---\na: 1", "1:1: directives (%YAML, %TAG) are not used here; remove the line"),
    ],
)
def test_what_is_not_used_here_is_refused_with_its_place(text, problem, either_parser):
    assert problems_of(text) == [problem]


def test_many_problems_are_found_in_one_reading():
    assert len(problems_of("a: *x\na: &y 1\n5: !z 2\n<<: 1\n")) == 6


def test_a_refused_key_takes_its_value_with_it():
    assert plain(read_document(b"5: x\n? [a]\n: {b: c}\nd: 1").root) == {"d": 1}


def test_the_first_of_two_equal_keys_stays():
    assert plain(read_document(b"a: 1\na: 2").root) == {"a": 1}


@pytest.mark.parametrize("text", ["---\na: 1\n", "%YAML 1.2\n---\na: 1\n...\n", '{"a":1}'])
def test_one_document_may_be_framed(text):
    assert value_of(text) == {"a": 1}


@pytest.mark.parametrize("text", ["", "\n\n", "# only\n  # comments\n", "\ufeff"])
def test_nothing_is_a_document_without_a_root(text):
    assert read_document(text.encode()) == document.Document(None, ())


# Bounds


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_depth_is_bounded(opening):
    assert problems_of(opening * 100_000)[0].endswith(f"nested more than {MAX_DEPTH} deep")


def test_the_deepest_nesting_allowed_is_read():
    assert str(value_of("[" * MAX_DEPTH + "]" * MAX_DEPTH)) == "[" * MAX_DEPTH + "]" * MAX_DEPTH


def test_the_number_of_values_is_bounded(monkeypatch):
    monkeypatch.setattr(document, "MAX_VALUES", 5)
    assert value_of("[1, 2, 3, 4]") == [1, 2, 3, 4]
    assert problems_of("[1, 2, 3, 4, 5]") == ["1:14: more than 5 values in the file"]


def test_aliases_can_not_multiply():
    bomb = "a: &a [x, x]\n" + "".join(f"b{n}: [*a, *a, *a]\n" for n in range(1000))
    assert len(problems_of(bomb)) == 3001
