"""`--config FILE.yaml`: options from a file, weaker than the environment and the command line."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

DEEPEST = 8
"""Lists and mappings within each other; settings need two."""


def _read(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _check(text)
        settings = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split())
        raise click.BadParameter(f"{path} cannot be read as YAML: {cause}.", ctx, param) from error
    if not isinstance(settings, dict | None):
        raise click.BadParameter(f"{path}: expected lines such as `limit: 10`.", ctx, param)
    known = {p.name: p for p in ctx.command.params if p.name not in ("config", "help")}
    spelt = {option.lstrip("-").replace("-", "_"): p for p in known.values() for option in p.opts}
    chosen = {}
    for key, value in (settings or {}).items():
        option = spelt.get(str(key).replace("-", "_"))
        if option is None or option.name is None:
            near = get_close_matches(str(key), spelt)
            guess = f" Did you mean {' or '.join(near)}?" if near else ""
            raise click.BadParameter(
                f"{path}: there is no setting {key!r}.{guess} Settings: {', '.join(spelt)}.",
                ctx,
                param,
            )
        if value is not None:
            chosen[option.name] = _as_given(option, value)
    ctx.default_map = {**(ctx.default_map or {}), **chosen}


def _check(text: str) -> None:
    """Refuse what a few lines of YAML can stand for that no memory, and no patience, holds:
    aliases of aliases, and lists within lists without end."""
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which settings need none of")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it has lists or mappings more than {DEEPEST} deep")


def _as_given(option: click.Parameter, value: Any) -> Any:
    """A single value of an option that may be repeated is a list of one."""
    repeated = isinstance(option, click.Option) and option.multiple
    return [value] if repeated and not isinstance(value, list) else value


CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE.yaml",
    is_eager=True,
    expose_value=False,
    callback=_read,
    help="Read options from a YAML file, such as `limit: 10`; flags and environment are stronger.",
)
"""The option, for commands with many of them."""
