"""Tables for reading, and exports that carry every column and exact values."""

from __future__ import annotations

import io
import json
import math
from datetime import datetime
from decimal import Decimal

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.errors import UsageError
from tracekit.reports.export import EXPORT_FORMATS, export
from tracekit.reports.tables import LAYOUTS, render
from tracekit.reports.text import display_width, interval, number, printable, shorten

HOSTILE = "a\nb\x1b[31m\r\u202e\x07| <b> `x` 日本 🦙"


def widest(text: str) -> int:
    return max(map(display_width, text.splitlines()))


@pytest.mark.parametrize(
    ("value", "half", "shown"),
    [
        (9.302841, 0.1053, "9.30"),  # two significant digits of the half-width
        (9.302841, 0.0072, "9.3028"),
        (1234.5678, 12.0, "1235"),
        (1234.5678, 345.0, "1235"),
        (9.302841, None, "9.303"),  # four significant digits without an interval
        (13.2422, None, "13.24"),
        (0.12345678, None, "0.1235"),
        (120.7, None, "120.7"),
        (123456.7, None, "123457"),
        (0.0000001234, None, "1.23e-07"),
        (4.0, 0.0, "4.000"),  # an interval of no width says nothing about digits
        (-0.00001, 0.01, "0.000"),
        (0.0, None, "0"),
        (-3e-17, 1e-17, "0"),  # noise of the arithmetic
        (7, None, "7"),
        (None, None, "–"),
        (math.nan, None, "–"),
        (math.inf, None, "∞"),
    ],
)
def test_numbers_are_rounded_as_far_as_they_are_known(value: float | None, half: float | None, shown: str) -> None:
    assert number(value, half) == shown


def test_an_interval_has_the_digits_of_its_half_width() -> None:
    assert interval(9.2012, 9.4123) == "[9.20, 9.41]"
    assert interval(None, 9.4123) == ""
    assert interval(math.nan, 1.0) == ""


def test_printable_escapes_what_drives_a_terminal() -> None:
    assert printable(HOSTILE) == "a\\nb\\x1b[31m\\r\\u202e\\x07| <b> `x` 日本 🦙"
    assert printable("👩‍🚀 é naïve") == "👩‍🚀 é naïve"


@given(st.text(max_size=60), st.integers(1, 40))
def test_text_fits_and_drives_nothing(text: str, width: int) -> None:
    shown = shorten(printable(text), width)
    assert display_width(shown) <= width
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in shown)


WINDOWS = pl.DataFrame(
    {
        "trace": ["gptoss"] * 2,
        "phase": ["decode"] * 2,
        "batch_size": [1, 1],
        "window": [1, 4],
        "n_windows": [28262, 28070],
        "observed": [4.0, 9.3028],
        "observed_lo": [4.0, 9.2012],
        "observed_hi": [4.0, 9.4123],
        "per_top_k": [1.0, 2.3257],
        "expected_uniform": [4.0, 13.2422],
        "expected_popularity": [4.0, 12.1333],
        "expected_label": [None, None],
        "expected_request": [4.0, 10.3467],
        **{
            f"reduction_{name}{end}": [0.0, value + offset]
            for name, value in (("uniform", 0.2975), ("popularity", 0.2333), ("request", 0.1009))
            for end, offset in (("", 0.0), ("_lo", -0.0072), ("_hi", 0.0073))
        },
        **{f"reduction_label{end}": [None, None] for end in ("", "_lo", "_hi")},
    }
)


def test_the_windows_table() -> None:
    assert render(WINDOWS, layout="windows") == (
        "gptoss, decode, batch size 1: unique experts, and how many to expect\n"
        "window  observed 95 %              × k  uniform  popularity  request\n"
        "     1     4.000 [4.000, 4.000]  1.000    4.000       4.000    4.000\n"
        "     4     9.30  [9.20, 9.41]    2.326   13.24       12.13    10.35\n"
        "\n"
        "fewer than expected, %\n"
        "window  uniform 95 %            popularity 95 %            request 95 %\n"
        "     1     0    [0, 0]                0    [0, 0]             0    [0, 0]\n"
        "     4    29.75 [29.03, 30.48]       23.33 [22.61, 24.06]    10.09 [9.37, 10.82]\n"
    )


ATTRIBUTION = pl.DataFrame(
    [
        ("t", "decode", "popularity", 4, 13.2422, 12.1333, 1.1089, 0.2815, 0.26, 0.3, True),
        ("t", "decode", "label", 4, 12.1333, 12.1333, 0.0, None, None, None, False),
        ("t", "decode", "request", 4, 12.1333, 10.3467, 1.7866, 0.4535, 0.43, 0.47, True),
        ("t", "decode", "token_order", 4, 10.3467, 9.3028, 1.0439, 0.265, 0.25, 0.28, True),
    ],
    schema=[
        "trace",
        "phase",
        "cause",
        "window",
        "unique_before",
        "unique_after",
        "drop",
        "share",
        "share_lo",
        "share_hi",
        "resolved",
    ],
    orient="row",
)


def test_the_attribution_table_says_what_is_not_resolved() -> None:
    assert render(ATTRIBUTION, layout="attribution") == (
        "t, decode, window of 4 tokens: unique experts, cause by cause\n"
        "cause         from    → to   drop  share, % 95 %\n"
        "popularity   13.24  12.13   1.109      28.1 [26.0, 30.0]\n"
        "label        12.13  12.13   0           –                 unresolved\n"
        "request      12.13  10.35   1.787      45.4 [43.0, 47.0]\n"
        "token order  10.35   9.303  1.044      26.5 [25.0, 28.0]\n"
    )


@given(
    names=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=20, unique=True),
    cell=st.text(max_size=200),
    width=st.integers(40, 120),
)
def test_any_frame_fits_the_width(names: list[str], cell: str, width: int) -> None:
    text = render(pl.DataFrame({name: [cell, None] for name in names}), width=width)
    assert isinstance(text, str)
    assert widest(text) <= width


def test_every_hidden_column_is_named_once() -> None:
    text = render(WINDOWS, layout="windows", width=60)
    assert isinstance(text, str)
    footer = " ".join(text[text.index("(no room") :].split())
    names = "expected_request, reduction_popularity_lo/hi, reduction_request_lo/hi"
    assert footer == f"(no room for {names}; --format csv has every column)"


def grouped(names: list[str], group: str = "label") -> pl.DataFrame:
    """Windows of 1 to 8 tokens for each group."""
    rows = WINDOWS.row(1, named=True)
    return pl.DataFrame(
        [{**rows, group: name, "window": t, "observed": float(t)} for name in names for t in range(1, 9)]
    )


def test_windows_by_group_are_one_table_of_windows_of_four() -> None:
    names = ["mmlu_pro_validation_of_physics", "mmlu_pro_validation_of_biology"]
    assert render(grouped(names), layout="windows") == (
        "gptoss, decode, batch size 1, window of 4 tokens: unique experts, and how far\n"
        "below each baseline, %\n"
        "label                        observed 95 %          uniform  popularity  request\n"
        "mmlu_pro_vali…on_of_physics      4.00 [9.20, 9.41]    29.75       23.33    10.09\n"
        "mmlu_pro_vali…on_of_biology      4.00 [9.20, 9.41]    29.75       23.33    10.09\n"
        "\n"
        "(--format csv has the other windows and every column)\n"
    )
    short = grouped(names).filter(pl.col("window") <= 3)
    assert "window of 3 tokens" in str(render(short, layout="windows"))
    assert len(export(grouped(names), "ndjson").splitlines()) == 16


def test_autocorr_by_group_is_one_table_of_lags() -> None:
    rows = [
        {"trace": "t", "phase": "decode", "layer": layer, "lag": d, "overlap": 1 / d, "expected_request": 0.3}
        | {"expected_uniform": 0.125, "expected_popularity": 0.2 + layer / 10}
        for layer in (0, 7)
        for d in range(1, 7)
    ]
    assert render(pl.DataFrame(rows), layout="autocorr") == (
        "t, decode: overlap by lag (expected: uniform 0.1250)\n"
        "layer  popularity  request  lag 1   lag 2   lag 4   lag 6\n"
        "    0      0.2000   0.3000  1.000  0.5000  0.2500  0.1667\n"
        "    7      0.9000   0.3000  1.000  0.5000  0.2500  0.1667\n"
        "\n"
        "(request: expected at lag 1; --format csv has every lag and column)\n"
    )


def test_attribution_by_group_is_one_table_of_shares() -> None:
    frame = pl.concat([ATTRIBUTION.with_columns(layer=pl.lit(layer)) for layer in (0, 1)])
    assert render(frame, layout="attribution") == (
        "t, decode, window of 4 tokens: unique experts, and the causes' shares of the\n"
        "drop, %\n"
        "layer  uniform  observed  popularity  label  request  token order\n"
        "    0    13.24     9.303       28.1      –*    45.4         26.5\n"
        "    1    13.24     9.303       28.1      –*    45.4         26.5\n"
        "* not resolved\n"
        "\n"
        "(--format csv has every step and interval)\n"
    )


def test_a_negative_share_is_explained() -> None:
    share = pl.when(pl.col("cause") == "request").then(-0.411).otherwise(pl.col("share"))
    text = render(ATTRIBUTION.with_columns(share=share), layout="attribution")
    assert isinstance(text, str)
    [line] = [line for line in text.splitlines() if line.startswith("request ")]
    assert line.endswith("negative")
    assert "request, negative: a request's tokens are no more alike than the trace's" in text
    assert "token order, negative" not in text


def test_a_table_says_what_it_hides() -> None:
    frame = pl.DataFrame({f"column_{i}": range(200) for i in range(30)})
    text = render(frame)
    assert isinstance(text, str)
    assert "(the first 50 rows; --format csv has all)" in text
    assert "(no room for column_8, " in text
    assert "column_15, 14 more; --format csv has every column)" in " ".join(text.split())


def test_an_empty_frame_says_so() -> None:
    assert render(pl.DataFrame({"a": []}, schema={"a": pl.Int64})) == "a\n(no rows)\n"
    assert render(WINDOWS.clear(), layout="windows") == "(no rows)\n"


def test_bold_headings_are_the_only_escapes() -> None:
    plain, bold = render(WINDOWS, layout="windows"), render(WINDOWS, layout="windows", bold=True)
    assert isinstance(plain, str)
    assert isinstance(bold, str)
    assert "\x1b" not in plain
    assert bold.replace("\x1b[1m", "").replace("\x1b[0m", "") == plain


EVERYTHING = pl.DataFrame(
    {
        "float": [1 / 3, math.nan, math.inf],
        "int": [2**63 - 1, None, 0],
        "decimal": [Decimal(45), None, Decimal("1.5")],
        "list": [[1, 2], [], None],
        "struct": [{"a": 1.0}, None, {"a": math.nan}],
        "binary": [b"\x00\xff", None, b""],
        "time": [datetime(2026, 11, 22, 6, 30), None, datetime(1970, 1, 1)],
        "text": [HOSTILE, None, ""],
        "bool": [True, None, False],
    }
)


def test_json_has_plain_numbers_and_nulls() -> None:
    rows = json.loads(export(EVERYTHING, "json"))
    assert rows[0] == {
        "float": 1 / 3,
        "int": 2**63 - 1,
        "decimal": 45,
        "list": [1, 2],
        "struct": {"a": 1.0},
        "binary": "00ff",
        "time": "2026-11-22T06:30:00",
        "text": HOSTILE,
        "bool": True,
    }
    assert rows[1].pop("list") == []
    assert set(rows[1].values()) == {None}
    assert rows[2]["float"] is None
    assert rows[2]["struct"] == {"a": None}
    assert [json.loads(line) for line in export(EVERYTHING, "ndjson").splitlines()] == json.loads(
        export(EVERYTHING, "json")
    )


def test_csv_is_exact() -> None:
    back = pl.read_csv(io.BytesIO(export(EVERYTHING, "csv")))
    assert back["float"][0] == 1 / 3
    assert back["float"][1] is None
    assert back["text"].to_list() == [HOSTILE, None, ""]
    assert back["list"].to_list() == ["[1, 2]", "[]", None]
    assert back["binary"][0] == "00ff"


def test_parquet_is_exact() -> None:
    assert pl.read_parquet(io.BytesIO(export(EVERYTHING, "parquet"))).equals(EVERYTHING)


def test_markdown_keeps_every_row_a_row_and_markup_out() -> None:
    lines = export(EVERYTHING, "markdown").decode().splitlines()
    assert len(lines) == 2 + EVERYTHING.height
    assert all(line.replace("\\|", "").count("|") == EVERYTHING.width + 1 for line in lines)
    assert "<b>" not in lines[2]


@pytest.mark.parametrize("fmt", EXPORT_FORMATS)
def test_every_format_takes_a_frame_without_rows(fmt: str) -> None:
    content = export(EVERYTHING.clear(), fmt)
    assert (content == b"") == (fmt == "ndjson")
    if fmt == "json":
        assert json.loads(content) == []


def test_no_export_rounds() -> None:
    for fmt in ("csv", "json", "ndjson", "markdown"):
        assert b"0.2974999999" in export(pl.DataFrame({"x": [0.2974999999]}), fmt)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError, match="xlsx"):
        render(WINDOWS, "xlsx")
    assert {"windows", "autocorr", "attribution", "load", "summary", "info"} <= set(LAYOUTS)
