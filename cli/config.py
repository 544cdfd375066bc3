"""`--config FILE.yaml`: options from a file, weaker than the environment and the command line."""

import re
from pathlib import Path
from typing import Any

import click

DEEPEST = 8
"""Lists and mappings within each other; settings need five."""
LONGEST = 4_000
"""Characters of one value."""
NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""Characters that no name of a file can have."""
MOST = 100_000
"""Characters of a file: some seconds to read, and as many methods as a run takes."""


def _read(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    import yaml

    # Imported late: Zarr comes with it.
    from retrace.traces.storage.regular import open_regular

    try:
        with open_regular(path) as file:
            # No character takes more than four bytes.
            text = file.read(4 * MOST + 1).decode()
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
            from retrace.traces.errors import did_you_mean

            guess = did_you_mean(str(key), spelt)
            raise click.BadParameter(
                f"{path}: there is no setting {key!r}.{guess} Settings: {', '.join(spelt)}.",
                ctx,
                param,
            )
        if value is not None:
            chosen[option.name] = _as_given(option, value)
    ctx.default_map = {**(ctx.default_map or {}), **chosen}


def _check(text: str) -> None:
    """Refuse what a few lines of YAML can stand for that no memory, and no patience, holds, and
    what stands for other things than texts, numbers, lists and mappings."""
    import yaml

    if len(text) > MOST:
        raise yaml.YAMLError(f"it has more than {MOST:,} characters")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which settings need none of")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError("it has tags (!name), which settings need none of")
        if isinstance(event, yaml.ScalarEvent):
            if len(event.value) > LONGEST:
                raise yaml.YAMLError(f"it has a value of more than {LONGEST:,} characters")
            if NO_TEXT.search(event.value):
                raise yaml.YAMLError("it has a value that is no text")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it has lists or mappings more than {DEEPEST} deep")


def _as_given(option: click.Parameter, value: Any) -> Any:
    """A value as the command line would give it: once for each time that it may be repeated."""
    if isinstance(option, click.Option) and option.multiple:
        return [_once(option, one) for one in (value if isinstance(value, list) else [value])]
    return _once(option, value)


def _once(option: click.Parameter, value: Any) -> Any:
    """As text, but for the types of `parameters`, which read lists and mappings too."""
    own = isinstance(option.type, click.types.FuncParamType)
    if value is None or (isinstance(value, list | dict) and not own):
        raise click.BadParameter(f"{option.opts[-1].lstrip('-')}: expected a value.")
    return value if own else str(value)


FILE = click.Argument(
    ["config"],
    type=click.Path(path_type=Path),
    metavar="FILE.yaml",
    is_eager=True,
    expose_value=False,
    callback=_read,
)
"""The file as an argument, for a command that is made of one."""

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
