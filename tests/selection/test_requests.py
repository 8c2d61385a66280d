"""What users write, and what they are told when it is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from pyprune.errors import PyPruneError
from pyprune.selection.requests import (
    parse_amount,
    parse_amounts,
    parse_count,
    parse_layers,
    parse_ratio,
    parse_roles,
    units_of,
)


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        (None, None),
        ("3-5", [3, 4, 5]),
        (" 3 - 5 ", [3, 4, 5]),
        ("3:5", [3, 4]),
        ("7:", [7, 8, 9]),
        (":2", [0, 1]),
        ("0,4,8-9", [0, 4, 8, 9]),
        ("5", [5]),
        (5, [5]),
        ([5, 3, 3], [3, 5]),
        (range(2, 4), [2, 3]),
        (np.array([1, 2]), [1, 2]),
        (["0-1", 4, "8:10"], [0, 1, 4, 8, 9]),
    ],
)
def test_layer_ranges_are_read(spec, layers) -> None:
    assert parse_layers(spec, 10) == layers


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("3-27", "there is no layer 10. The model has layers 0 to 9"),
        ([-1], "there is no layer -1"),
        ("5-3", "the range '5-3' is empty"),
        ("5:5", "the range '5:5' is empty"),
        ("a-b", "is not a layer range. Give"),
        ("1,x", "'x' is not a layer range"),
        (":", "is not a layer range"),
        ("", "is not a layer range"),
        ([], "names no layer"),
        ([1.5], "1.5 is not a layer range"),
        ([True], "True is not a layer range"),
        (2.0, "is not a layer range"),
    ],
)
def test_wrong_layer_ranges_say_what_is_wrong(spec, message) -> None:
    with pytest.raises(PyPruneError, match=r"^layers") as caught:
        parse_layers(spec, 10)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5.4B", 5_400_000_000),
        ("108M", 108_000_000),
        ("750k", 750_000),
        ("1_000", 1000),
        ("1,000", 1000),
        (".5 M", 500_000),
        (7, 7),
        (2e9, 2_000_000_000),
        (np.int64(12), 12),
        (6_738_415_617, 6_738_415_617),
    ],
)
def test_parameter_counts_are_read(text, count) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["5.4X", "", "-3", -3, 0, "0M", float("nan"), float("inf"), True, None, [1]])
def test_wrong_parameter_counts_are_refused(text) -> None:
    with pytest.raises(PyPruneError, match=r"^target_params.*Give a number of parameters"):
        parse_count(text)


@pytest.mark.parametrize("ratio", [0, 0.0, 0.999, np.float32(0.5)])
def test_ratios_are_read(ratio) -> None:
    assert parse_ratio(ratio) == ratio


@pytest.mark.parametrize("ratio", [1, 1.0, -0.1, float("nan"), "0.2", True, None])
def test_wrong_ratios_are_refused(ratio) -> None:
    with pytest.raises(PyPruneError, match=r"^ratio"):
        parse_ratio(ratio)


def test_a_percentage_is_recognised() -> None:
    with pytest.raises(PyPruneError, match=r"Did you mean 0\.2\?"):
        parse_ratio(20)


def test_roles_are_read_from_text_and_lists_once_each() -> None:
    assert parse_roles("roles", "ffn, kv_heads,ffn") == ["ffn", "kv_heads"]
    assert parse_roles("roles", ["hidden"]) == ["hidden"]


@pytest.mark.parametrize(
    ("roles", "message"), [("fnn", "Did you mean 'ffn'"), ([], "names no role"), ([3], "not known")]
)
def test_wrong_roles_are_refused(roles, message) -> None:
    with pytest.raises(PyPruneError, match=message):
        parse_roles("roles", roles)


def test_an_integer_is_a_number_of_units_and_a_float_a_fraction() -> None:
    assert parse_amounts("widths", {"kv_heads": 0.5, "ffn": np.int64(5504)}) == {"kv_heads": 0.5, "ffn": 5504}
    assert units_of(1, 8) == 1
    assert units_of(1.0, 8) == 8
    assert units_of(0.5, 3) == 2
    assert units_of(0.01, 8) == 1


@pytest.mark.parametrize("amount", [0, -1, 0.0, 1.5, float("nan"), "0.5", True, None])
def test_wrong_amounts_are_refused(amount) -> None:
    with pytest.raises(PyPruneError, match="for ffn"):
        parse_amounts("widths", {"ffn": amount})
    with pytest.raises(PyPruneError, match=r"^min_keep"):
        parse_amount("min_keep", amount)


@pytest.mark.parametrize("widths", [{}, 0.5, "ffn=3", [("ffn", 3)]])
def test_widths_must_be_a_mapping(widths) -> None:
    with pytest.raises(PyPruneError, match="is empty" if widths == {} else "is not a mapping from role to width"):
        parse_amounts("widths", widths)
