"""`retrace plan`: what a plan says, how two differ, both as one, and its map."""

from pathlib import Path

import click

from retrace.cli.command import Command
from retrace.cli.parameters import FORMAT
from retrace.cli.screen import note, plural, print_facts, print_json, print_table


@click.command(
    "plan",
    cls=Command,
    epilog="""\b
Example:
  retrace plan budgets.json --plot map.png
  retrace plan lower.json upper.json --merge whole.json""",
)
@click.argument("file", type=click.Path())
@click.argument("other", type=click.Path(), required=False)
@click.option(
    "--merge",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the layers of FILE and OTHER as one plan.",
)
@click.option(
    "--override",
    is_flag=True,
    help="Where both say something else of a kv head, OTHER holds; by default they do not merge.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the map of the plan."
)
@FORMAT
def command(
    file: str, other: str | None, merge: Path | None, override: bool, plot: Path | None, format: str
) -> None:
    """Check the plan in FILE and say what it holds, or in which kv heads it and OTHER differ.

    A plan is a method and a budget for every kv head, as `retrace recommend --out` writes it.
    """
    from retrace.analyze import Plan, draw_plan

    if other is None and (merge is not None or override):
        raise click.UsageError("Two plans are merged: name another one.")
    plan = Plan.load(file)
    if other is not None:
        second = Plan.load(other)
        rows = plan.compare(second)
        if merge is not None:
            plan = plan.merge(second, override=override)
            plan.save(merge)
        if format == "json":
            print_json(rows.to_dict("records"))
        else:
            lines = [[str(cell) for cell in row] for row in rows.to_numpy().tolist()]
            columns = ["Layer", "KV head", file, other]
            title = f"{plural(len(rows), 'kv head')} in which they differ"
            print_table(columns, lines, title=title, left=columns[2:])
    elif format == "json":
        print_json(plan.to_json())
    else:
        heads = len(plan.settings)
        print_facts(
            [
                ("Plan", f"plan:{plan.digest}"),
                ("Layers", f"{len(plan.layers)}, {plural(heads, 'kv head')}"),
                *((name, plural(count, "kv head")) for name, count in plan.counts().items()),
            ]
        )
    if merge is not None:
        note(f"Written: {merge}")
    if plot is not None:
        note(f"Plot: {draw_plan(plan, plot)}")
