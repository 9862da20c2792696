"""The tables of a family as text cells, which Markdown, HTML and the terminal then format."""

from collections.abc import Sequence

from cascade.report.plots import short_number
from cascade.report.records import Losses, Metric, Row, find_metric, metric_names

Table = list[list[str]]
"""Rows of text cells; the first row is the head."""


def size_table(rows: Sequence[Row]) -> Table:
    """Shape, size and speed of each model, without baselines and candidates."""
    teacher = next((row for row in rows if row.role == "teacher"), None)
    head = [
        "",
        "parameters",
        "of parent",
        "layers",
        "hidden",
        "MLP",
        "heads",
        "MB",
        "prefill tok/s",
        "decode tok/s",
        "peak MB",
    ]
    table = [head]
    for row in rows:
        if row.role in ("baseline", "candidate"):
            continue
        dims, speed = row.dims, row.speed
        share = row.num_parameters / teacher.num_parameters if teacher else None
        heads = f"{dims['num_attention_heads']}/{dims['num_key_value_heads']}"
        table.append(
            [
                row.name,
                f"{row.num_parameters:,}",
                "" if share is None else f"{share:.0%}",
                str(dims["num_hidden_layers"]),
                str(dims["hidden_size"]),
                str(dims["intermediate_size"]),
                heads,
                _number(row.bytes, 1e6),
                _number(speed.prefill_tokens_per_s),
                _number(speed.decode_tokens_per_s),
                _number(speed.peak_memory_bytes, 1e6),
            ]
        )
    return table


def quality_table(rows: Sequence[Row]) -> Table:
    """Every metric of every row as value ± standard error, with the retention where it is defined."""
    rows = [row for row in rows if row.role != "candidate"]
    names = metric_names(list(rows))
    table = [["", *names]]
    for row in rows:
        table.append([row.name, *(_metric_cell(find_metric(row, name)) for name in names)])
    return table


def stage_table(rows: Sequence[Row]) -> Table:
    """Loss and KL on selection text after cut, repair and recovery, beside each other; tokens and cost."""
    head = [
        "",
        "seed",
        "loss: cut",
        "repaired",
        "recovered",
        "KL: cut",
        "repaired",
        "recovered",
        "tokens or examples",
        "cumulative",
        "seconds",
        "FLOPs",
    ]
    table = [head]
    for row in rows:
        if row.role != "member":
            continue
        stages = [losses or Losses() for losses in (row.stages.cut, row.stages.repaired, row.stages.recovered)]
        table.append(
            [
                row.name,
                row.seed or "",
                *(_loss(losses.loss) for losses in stages),
                *(_loss(losses.kl_to_teacher) for losses in stages),
                f"{row.tokens.hop:,}",
                f"{row.tokens.cumulative:,}",
                _number(row.cost.seconds),
                "" if row.cost.flops is None else short_number(row.cost.flops),
            ]
        )
    return table


def shape_table(rows: Sequence[Row]) -> Table:
    """The shapes of each member's search, the chosen shape first; only the head where no shape was searched."""
    table = [["", "", "layers", "hidden", "MLP", "heads", "parameters", "KL: repaired", "recovered shortly", "seconds"]]
    for row in rows:
        if row.role != "candidate":
            continue
        dims, repaired, recovered = row.dims, row.stages.repaired or Losses(), row.stages.recovered or Losses()
        table.append(
            [
                row.name,
                row.status,
                str(dims["num_hidden_layers"]),
                str(dims["hidden_size"]),
                str(dims["intermediate_size"]),
                f"{dims['num_attention_heads']}/{dims['num_key_value_heads']}",
                f"{row.num_parameters:,}",
                _loss(repaired.kl_to_teacher),
                _loss(recovered.kl_to_teacher),
                _number(row.cost.seconds),
            ]
        )
    return table


def markdown_table(table: Table) -> str:
    """The table in Markdown, with its cells escaped."""
    lines = ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    return "\n".join(lines)


def plain_table(table: Table) -> str:
    """The table for a terminal, in columns of even width."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _metric_cell(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return ""
    text = f"{metric.value:.4g}"
    if metric.stderr:
        text += f" ± {metric.stderr:.2g}"
    if metric.retention is not None:
        text += f" ({metric.retention:.0%}"
        interval = metric.retention_interval
        text += f", {interval[0]:.0%} to {interval[1]:.0%})" if interval else ")"
    return text


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"


def _number(quantity: float | None, unit: float = 1.0) -> str:
    return "" if quantity is None else f"{quantity / unit:,.1f}" if quantity / unit < 100 else f"{quantity / unit:,.0f}"


def _escape(cell: str) -> str:
    """A cell without links, pictures, code or tags, as its text may come from outside the program."""
    cell = cell.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    for sign in "|[]`":
        cell = cell.replace(sign, f"\\{sign}")
    return cell
