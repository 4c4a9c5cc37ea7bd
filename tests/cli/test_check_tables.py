"""What `cqtool check` prints fits a terminal, and says what the report says."""

from __future__ import annotations

from typing import Any

import pytest

from cqtool.cli.check_tables import (
    COLUMNS,
    MOST_HEADS,
    head_rows,
    paired_rows,
    quality_table,
    table_rows,
)
from cqtool.cli.output import _plain_table


def row(label: str, **changes: Any) -> dict[str, Any]:
    values = {
        "label": label,
        "bits_per_channel": 4.5,
        "effective_bits": 5.25,
        "context_bits": 4.56,
        "perplexity": 1234.567,
        "perplexity_se": 123.456,
        "perplexity_increase": 0.12345,
        "perplexity_increase_se": 0.01234,
        "kl": 0.1234,
        "kl_se": 0.0123,
        "top1": 0.9512,
        "top1_se": 0.0123,
        "cache_bytes_per_token": 12345.6,
        "cache_bytes_per_token_full": 24691.2,
    }
    return values | changes


@pytest.mark.parametrize("context", [None, 131072])
def test_thirty_formats_fit_100_columns(context: int | None) -> None:
    rows = [row(f"cq-8c{n}b fisher") for n in range(30)]
    columns, cells = quality_table(rows, context)
    printed = _plain_table(columns, cells, None, range(1, len(columns)))
    assert max(map(len, printed.splitlines())) <= 100 and len(cells) == 30
    shown = dict(zip(columns, cells[0], strict=True))
    assert shown["KL"] == "0.1234 ± 0.0123" and shown["eff. bits"] == "5.25"
    assert shown["increase"] == "12.3% ± 1.2%" and shown["perplexity"] == "1234.567"
    assert shown.get("at 131072") == (None if context is None else "4.56")


def test_a_table_that_fits_keeps_all_columns() -> None:
    small = [row("int4", perplexity=9.5, perplexity_se=None, top1_se=None)]
    assert quality_table(small, None) == (COLUMNS, table_rows(small))


def test_paired_rows_have_both_measures_of_a_format_in_a_line() -> None:
    def pair(other: str, measure: str, **changes: Any) -> dict[str, Any]:
        fixed = {"other": other, "measure": measure, "unit": "windows", "better": 22, "pairs": 24}
        return {**fixed, "difference": -0.021, "difference_se": 0.003, **changes}

    paired = [
        pair("a", "kl"),
        pair("a", "nll", difference=0.5, difference_se=None),
        pair("a", "exact", unit="items"),
        pair("b", "kl", difference_se=None),
        pair("b", "nll"),
    ]
    assert paired_rows(paired) == [
        ["a", "-0.0210 ± 0.0030", "22 of 24", "+0.5000"],
        ["b", "-0.0210", "22 of 24", "-0.0210 ± 0.0030"],
    ]


def test_of_many_heads_the_costliest_are_shown_with_their_share_of_all() -> None:
    costs = [
        {"layer": layer, "kind": "value", "head": head, "bits_per_channel": 1.0, "kl": kl}
        for layer, head, kl in [(at // 8, at % 8, 0.001) for at in range(63)] + [(9, 5, 0.937)]
    ]
    shown = head_rows(costs)
    assert shown[0] == ["9", "5", "values", "1.00", "0.93700", "93.7%"]
    # Those that cost the same follow in the model's order.
    assert shown[10] == ["1", "1", "values", "1.00", "0.00100", "0.1%"]
    assert len(shown) == MOST_HEADS
