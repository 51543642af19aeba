"""YAML as gr reads and writes it: what scalars mean, and the one sentence for what is refused."""

from pathlib import Path

import pytest
import yaml

from gr import yaml12
from gr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-08", -8),
        ("+1", 1),
        ("0o10", 8),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.5e1", -5.0),
        ("0.30", 0.3),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("0b11", "0b11"),
        ("2024-01-31", "2024-01-31"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("=", "="),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("nUll", "nUll"),
        ("!!str 010", "010"),
        ("!!int '010'", 10),
        ("'010'", "010"),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text, value):
    read = yaml12.load(f"key: {text}", "it")["key"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 2\na: 3\n", "it, line 3: 'a' stands twice in the same mapping (first in line 1)"),
        (
            "train:\n  epochs: 1\ndata: {}\ntrain:\n  seed: 2\n",
            "it, line 4: 'train' stands twice in the same mapping (first in line 1)",
        ),
        ("a:\n- {b: 1, 'b': 2}", "it, line 2: 'b' stands twice"),
        ("? [a]\n: 1\n", "it, line 1: a list or a mapping is used as a key"),
        ("x: {1: 2}", "it, line 1: '1' is used as a key, and keys are text: put it in quotes"),
        ("true: 2", "it, line 1: 'true' is used as a key"),
        ("~: 2", "it, line 1: '~' is used as a key"),
        ("a: &x [*x]", "it, line 1: what an alias stands for holds the alias itself"),
        ("a: *x", "it is not valid YAML, line 1: found undefined alias 'x'"),
        ("a: 1\n---\nb: 2\n", "it is not valid YAML, line 2: a second document begins here: keep one"),
        ("a:\n\tb: 1", "it is not valid YAML, line 2: a tab stands where YAML wants spaces"),
        ("a: 1\nb: \x07", "it is not valid YAML, line 2: the character '\\x07' is not allowed"),
        ("a: [1, 2", "it is not valid YAML, line 1: expected ',' or ']'"),
        ("a: " + "9" * 5000, "it, line 1: a number of 5,000 digits is too long"),
        ("[" * 5000, "it is nested too deeply to be read"),
        ("a: !!int x", "it, line 1: 'x' is no int of YAML 1.2"),
        ("a: !!int 1_0", "it, line 1: '1_0' is no int of YAML 1.2"),
        ("a: !!float 1:30.5", "it, line 1: '1:30.5' is no float of YAML 1.2"),
        ("a: !!bool yes", "it, line 1: 'yes' is no boolean: write true or false"),
        ("a: !!timestamp x", "it is not valid YAML, line 1: there is no such thing as"),
        ("a: !!python/object/apply:os.getcwd []", "it is not valid YAML, line 1: there is no such thing as"),
        ("a: !!set {b}", "it is not valid YAML, line 1: there is no such thing as"),
    ],
    ids=lambda text: repr(text[:24]),
)
def test_what_cannot_be_meant_is_refused_with_its_line(text, sentence):
    with pytest.raises(UserError) as refusal:
        yaml12.load(text, "it")
    assert str(refusal.value).startswith(sentence)
    assert "\n" not in str(refusal.value)


def test_aliases_are_read_and_cannot_blow_up():
    assert yaml12.load("a: &x [1, 2]\nb: *x", "it") == {"a": [1, 2], "b": [1, 2]}
    assert yaml12.load("a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}", "it")["b"] == {"k": 3, "l": 2}
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
    with pytest.raises(UserError, match=r"it, line 5: more than 100,000 values"):
        yaml12.load(bomb, "it")


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff"])
def test_nothing_is_none(text):
    assert yaml12.load(text, "it") is None


def test_a_mark_of_the_byte_order_is_no_part_of_the_first_key():
    assert yaml12.load("\ufeffa: 1", "it") == {"a": 1}


TEXTS = [
    "010",
    "1e3",
    "0o17",
    "0x1F",
    "yes",
    "true",
    "1:30",
    "~",
    "",
    ".inf",
    "2024-01-01",
    "1_000",
    "<<",
    "a: b",
]


def test_what_is_written_reads_the_same_here_and_with_yaml_1_1():
    value = {
        "texts": TEXTS,
        "numbers": [1e-6, 1e300, 0.1, 3.0, -0.0, 10**20, True, None],
        "on": {"é": "naïve"},
        "same": [[1], [1]],
    }
    text = yaml12.dump(value)
    assert yaml12.load(text, "it") == value
    assert yaml.safe_load(text)["texts"] == TEXTS
    assert list(yaml12.load(text, "it")) == list(value)  # in order


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_the_configs_that_come_along_mean_the_same_in_both_versions_of_yaml(file):
    assert yaml12.load(file.read_text(), str(file)) == yaml.safe_load(file.read_text())
