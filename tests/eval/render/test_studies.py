"""Tables of studies: newest rows only, and how to get rows where there are none."""

from __future__ import annotations

import pytest

from diffeff.eval.render.docs import RESULTS, records
from diffeff.eval.render.studies import STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_without_rows_it_says_how_to_measure(name: str) -> None:
    assert STUDIES[name].table([]) == f"Not measured yet: `{STUDIES[name].command}` does."


@pytest.mark.parametrize("name", STUDIES)
def test_committed_rows_fill_a_table(name: str) -> None:
    rows = records(name, RESULTS)
    lines = STUDIES[name].table(rows).splitlines()
    columns = len(STUDIES[name].head)
    assert len(lines) > 2
    assert all(line.replace("\\|", "").count("|") == columns + 1 for line in lines)


def test_the_newest_row_counts() -> None:
    row = {"model": "m", "method": "fora", "ratio_min": 0.9, "ratio_max": 1.1, "holds": True, "said_so": True}
    table = STUDIES["idle_caches"].table([row | {"ratio_median": 1.05}, row | {"ratio_median": 1.01}])
    assert "1.010 (0.90 to 1.10)" in table
    assert "1.05" not in table
