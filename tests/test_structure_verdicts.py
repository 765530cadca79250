"""Our rule and the log's on the same rows: what is asked where, and what a reader sees."""
import numpy as np
import pandas as pd
import pytest

from gears_nb.lab.power import Powered
from gears_nb.structure.verdicts import (
    LogRule,
    by_log,
    effect_lines,
    effects_figure,
    effects_shown,
    grounds,
    ours,
    ratio,
    rule_lines,
    rules_shown,
)

SAYS = {"better": "{arm} helps", "worse": "harm", "none": "not seen"}


def rows(values, recipe="ours", data="a", n=3):
    return pd.DataFrame([{"variant": v, "data": data, "recipe": recipe, "fold": "f", "seed": s, "h_gate": x * (1 + 0.001 * s * (i + 1))}
                         for i, (v, x) in enumerate(values.items()) for s in range(n)])


@pytest.fixture
def table():
    return pd.concat([rows({"base": 1.0, "x": 0.9, "y": 1.0}), rows({"base": 2.0, "x": 2.0}, "source"), rows({"base": 10.0, "x": 11.0, "y": 9.0}, data="b")], ignore_index=True)


def test_recipes_are_never_mixed(table):
    parts = grounds(table)
    assert list(parts) == ["a", "a, source's recipe", "b"] and sum(map(len, parts.values())) == len(table)
    assert all(part.recipe.nunique() == part.data.nunique() == 1 for part in parts.values())


def test_a_ground_is_asked_what_it_has_rows_for(table):
    both = {"x": Powered(("x",), SAYS, base="base"), "y": Powered(("y",), SAYS, base="base")}
    assert [v.sentence for v in ours(both, table)] == ["a: x", "a, source's recipe: x", "b: x", "a: y", "b: y"]
    assert [line["effect"] for line in effect_lines(both, table)] == ["better", "none", "worse", "none", "better"]
    assert all("95% interval" in v.outcome for v in ours(both, table))


def test_a_base_that_diverged_is_not_asked(table):
    gone = table.assign(h_gate=table.h_gate.where((table.variant != "base") | (table.data != "b")), diverged=0.0)
    asked = {"x": Powered(("x",), SAYS, base="base")}
    assert [v.sentence for v in ours(asked, gone)] == ["a: x", "a, source's recipe: x"] and len(effect_lines(asked, gone)) == 2


def test_the_log_s_rule_is_a_margin_of_means(table):
    rule = LogRule("x stays", "x over base", ratio("x", "base"), "<=", 1.05, ("x", "base"), ".4")
    assert [v.outcome for v in by_log([rule], table)] == [True, True, False]
    assert all("log: .4" in v.sentence for v in by_log([rule], table))
    lines = rule_lines([rule], table)
    assert [line["holds"] for line in lines] == [True, True, False]
    assert rules_shown(lines).iloc[0].str.split(":").str[0].tolist() == ["holds", "holds", "fails"]
    lost = table.assign(h_gate=np.nan)
    assert {v.outcome for v in by_log([rule], lost)} == {None}


def test_one_row_a_variant_says_so(table):
    once = table[table.seed == 0]
    lines = effect_lines({"x": Powered(("x",), SAYS, base="base")}, once)
    assert effects_shown(lines).iloc[0, 0] == "better: -0.100 (? to ?), ?, n 1"


def test_every_ground_has_a_panel(table):
    fig = effects_figure(effect_lines({"x": Powered(("x",), SAYS, base="base"), "y": Powered(("y",), SAYS, base="base")}, table))
    assert [ax.get_title() for ax in fig.axes] == ["a", "a,\nsource's recipe", "b"]
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["x  |  base", "y  |  base"]
