"""The table of losses, from what each says of itself where it is registered."""

import re
from dataclasses import fields

from xhead.engines.problem import STREAMED
from xhead.losses import Entry, describe_loss, list_losses
from xhead.losses.config import FilterConfig


def loss_table() -> str:
    """One line a loss of the registry: name, formula, statistics, what it has of a pass over N x V, source."""
    lines = ["| loss | of a row | statistics | pass over N x V | source |", "|---|---|---|---|---|"]
    for name in list_losses():
        entry = describe_loss(name)
        statistics = ", ".join(f"`{statistic}`" for statistic in entry.statistics) or "a few logits"
        lines.append(f"| `{name}` | {_escaped(entry.formula)} | {statistics} | {_pass(entry)} | {entry.source} |")
    return "\n".join(lines)


def option_table() -> str:
    """One line a loss: its options and their defaults, without those that all with the gradient filter have."""
    shared = {field.name for field in fields(FilterConfig)}
    lines = ["| loss | options |", "|---|---|"]
    for name in list_losses():
        own = [field for field in fields(describe_loss(name).config) if field.init and field.name not in shared]
        shown = ", ".join(f"`{field.name}={field.default!r}`" for field in own)
        lines.append(f"| `{name}` | {shown or '-'} |")
    return "\n".join(lines)


def _pass(entry: Entry) -> str:
    if not set(entry.statistics) & set(STREAMED):
        return "no"
    return "yes, filtered" if any(field.name == "filter_eps" for field in fields(entry.config)) else "yes"


def _escaped(cell: str) -> str:
    """A bar would begin another cell."""
    return re.sub(r"(?<!\\)\|", r"\\|", cell)
