"""What a serving stack reads of a plan: one backend for each layer, and its budgets.

    retrace recommend traces/t.zarr --target error_norm=0.2 --share layer --fractions --out p.json
    python examples/serve_plan.py p.json 8192

Nothing of retrace is needed to read the file: it is JSON, and `plan.schema.json` of the package is
its schema. A layer whose kv heads have different methods cannot be served by one backend.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

FULL = "dense"


def backend(layer: dict[str, Any], context: int) -> tuple[str, list[int | None]]:
    """The method of a layer, and each kv head's budget in keys: None where it attends all.

    Raises:
        ValueError: its kv heads have different methods.
    """
    heads = sorted(layer["kv_heads"], key=lambda head: int(head["kv_head"]))
    methods = {head["method"] for head in heads} - {FULL}
    if len(methods) > 1:
        raise ValueError(
            f"Layer {layer['layer']} has {', '.join(sorted(methods))}: a backend each. Choose with "
            "--share layer."
        )
    budgets = [None if head["method"] == FULL else keys(head, context) for head in heads]
    return next(iter(methods), FULL), budgets


def keys(head: dict[str, Any], context: int) -> int:
    """The budget of a kv head: so many keys, or a fraction of the context, rounded up."""
    if "fraction" in head:
        return max(1, math.ceil(round(head["fraction"] * context, 6)))
    return int(head["topk"])


def main(file: str, context: str) -> None:
    """Print what a stack would be configured with."""
    plan = json.loads(Path(file).read_text(encoding="utf-8"))
    for layer in plan["layers"]:
        method, budgets = backend(layer, int(context))
        shown = ", ".join("all" if budget is None else str(budget) for budget in budgets)
        print(f"{layer['module']}: {method} ({shown})")


if __name__ == "__main__":
    main(*sys.argv[1:])
