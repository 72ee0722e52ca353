"""What operators get besides /metrics: the dashboard, the alerts, the table. They know the metrics that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from app.core.metrics import CATALOG
from scripts import metrics_table

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "deploy/grafana-dashboard.json"
ALERTS = ROOT / "deploy/prometheus-alerts.yml"
METRICS = {metric.name: metric for metric in CATALOG}
OF_SCRAPING = {"job", "instance"}
UNITS = {"none", "short", "s", "bytes", "Bps", "cps", "reqps", "percentunit", "dateTimeFromNow"}


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def panels() -> list[Any]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def alerts() -> list[Any]:
    [group] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return list(group["rules"])


def metric_of(sample: str) -> str:
    """The metric that a sample belongs to."""
    base = re.sub(r"_(bucket|sum|count)$", "", sample)
    return base if base in METRICS and METRICS[base].kind == "histogram" else sample


def used(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The metrics that a query reads, each with the labels that the query takes from it."""
    # What Grafana fills in stands for something of the same shape.
    tree = promql_parser.parse(expression.replace("$__rate_interval", "5m"))
    grouped: set[str] = set()
    found: list[tuple[str, set[str]]] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name, expression
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
        for name in ("expr", "lhs", "rhs", "args", "vector_selector", "param"):
            child = getattr(node, name, None)
            if isinstance(child, list):
                for one in child:
                    visit(one)
            elif isinstance(child, promql_parser.Expr):
                visit(child)

    visit(tree)
    assert found, expression
    for name, labels in found:
        yield name, labels | grouped


def check_query(expression: str) -> set[str]:
    """Fail on a metric or label that there is not; the metrics that were used."""
    names = set()
    for sample, labels in used(expression):
        if sample == "up":  # Prometheus' own
            continue
        name = metric_of(sample)
        assert name in METRICS, f"{sample} in {expression}"
        metric = METRICS[name]
        assert (metric.kind == "histogram") == sample.endswith(("_bucket", "_sum", "_count")), expression
        if metric.kind != "gauge":
            assert re.search(rf"(rate|increase)\({sample}\b", expression), f"a counter alone says nothing: {expression}"
        known = OF_SCRAPING | set(metric.labels) | ({"le"} if metric.kind == "histogram" else set())
        assert labels <= known, (labels - known, expression)
        names.add(name)
    return names


def test_every_metric_is_on_the_dashboard_and_every_query_reads_what_there_is() -> None:
    shown: set[str] = set()
    for panel in panels():
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            shown |= check_query(target["expr"])
    assert shown == METRICS.keys()


def test_the_legends_of_the_dashboard_name_labels_that_their_queries_keep() -> None:
    for panel in panels():
        for target in panel["targets"]:
            wanted = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"])))) - {"le"}
            assert wanted == kept, (panel["title"], target)


def test_the_dashboard_can_be_imported() -> None:
    board = dashboard()
    assert board.get("id") is None
    assert board["title"] == "Dialect"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    by_name = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert (by_name["datasource"]["type"], by_name["datasource"]["query"]) == ("datasource", "prometheus")
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    cells = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in cells, f"{panel['title']} lies on another panel"
                cells.add((x, y))


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_reads_what_there_is_and_says_what_to_do(alert: Any) -> None:
    check_query(alert["expr"])
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
    assert alert["annotations"]["summary"].endswith(".")
    assert re.fullmatch(r"\d+m", alert.get("for", "0m"))


def test_alerts_have_names_of_their_own_and_stand_in_the_documentation() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert len(set(names)) == len(names)
    page = metrics_table.PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"`(Dialect\w+)`", page)) == set(names)


@pytest.mark.parametrize(
    "query",
    [
        "dialect_nothing",
        "dialect_sockets_open{user_id='1'}",
        "sum by (phone) (dialect_sockets_open)",
        "dialect_commit_seconds",
        "dialect_messages_acknowledged_total",
        "sum(rate(dialect_sockets_open_bucket[5m]))",
    ],
)
def test_the_check_of_queries_sees_a_wrong_one(query: str) -> None:
    with pytest.raises(AssertionError):
        check_query(query)


def test_the_table_of_metrics_is_fresh() -> None:
    page = metrics_table.PAGE.read_text(encoding="utf-8")
    assert page == metrics_table.replace_table(page), "run: python scripts/metrics_table.py --write"
