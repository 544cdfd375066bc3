"""Method specs: `name:key=value,...`."""

import pytest

from retrace.analyze import method_names, parse_spec, parse_specs
from retrace.traces import RetraceError


@pytest.mark.parametrize("name", method_names())
def test_every_method_by_its_name(name: str) -> None:
    assert str(parse_spec(name)) == name
    assert parse_spec(f"{name}:").parameters == parse_spec(name).parameters


@pytest.mark.parametrize(
    "text",
    [
        "quest:page=32",
        "quest:pool=sum-softmax,page=8,least_pages=1",
        "exact:pool=mean-query,keep=sink:4+recent:0.25k",
        "window:keep=none",
        "loki:rank=16",
        "loki:rank=none",
        "sparq:rank=16,output=renorm,keep=recent:32",
        "random:seed=0",
        "quest:cache=fp8",
        "quest:cache=k:int4:32+v:turboquant-prod:3,page=8",
        "dense:cache=kivi:2",
        "vattention:cache=k:kivi:4+v:int4:token",
        "hnsw:ef=128,m=16,step=1",
        " quest: page = 32 , pool = max ".replace(" quest", "quest"),
    ],
)
def test_round_trip(text: str) -> None:
    spec = parse_spec(text)
    again = parse_spec(str(spec))
    assert again.method == spec.method
    assert str(again) == str(spec)


def test_shortest_form() -> None:
    assert str(parse_spec("quest:page=16")) == "quest"
    assert str(parse_spec("quest:page=32,pool=none")) == "quest:page=32"
    assert parse_spec("quest:page=32").parameters == {
        "pool": "none",
        "keep": "none",
        "budget": "k",
        "output": "renorm",
        "page": 32,
        "least_pages": 3,
        "cache": None,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qest", "no method 'qest'. Did you mean quest"),
        ("", "no method ''"),
        ("nothing like it", "`retrace methods` lists"),
        ("quest:pages=3", "no parameter 'pages'. Did you mean page"),
        ("window:sinks=4", "no parameter 'sinks'"),
        ("quest:page=big", "page='big': expected int"),
        ("quest:page=1.5", "page='1.5': expected int"),
        ("quest:page=0", "page=0: expected at least 1"),
        ("random:seed=-1", "seed=-1: expected at least 0"),
        ("quest:page", "'page' in its spec is not of the form key=value"),
        ("quest:=3", "'=3' in its spec is not of the form key=value"),
        ("exact:pool=median", "pool='median': expected one of none, sum"),
        ("exact:output=zero", "output='zero': expected one of renorm, mean-fill"),
        ("exact:keep=sink", "keep='sink': expected sink:N"),
        ("quest:cache=int4", "cache='int4': expected fp8, nvfp4, int8 or int4 with :32"),
        ("quest:cache=int3:32", "cache='int3:32': expected fp8"),
        ("quest:cache=", "cache='': expected fp8"),
        ("quest:cache=turboquant:0", "cache='turboquant:0': expected fp8"),
        ("quest:cache=turboquant:9", "cache='turboquant:9': expected fp8"),
        ("quest:cache=k:fp8", "or k:FORMAT+v:FORMAT where keys and values differ."),
        ("quest:cache=v:fp8+k:fp8", "or k:FORMAT+v:FORMAT where keys and values differ."),
        ("quest:cache=k:fp8+v:int2", "cache='k:fp8+v:int2': expected fp8"),
        ("block-oracle:cache=int4:channel", "and a block's queries share their keys."),
        ("retroinfer:cache=int4:channel", "which a state that computes outputs does not follow."),
        ("vattention:cache=kivi:2", "take another format for values, as in k:kivi:2+v:int4:token."),
        ("blocks:of=quest:cache=fp8", "name the cache beside it, as in of=quest,cache=fp8."),
    ],
)
def test_mistakes_say_what_is_meant(text: str, message: str) -> None:
    with pytest.raises(RetraceError) as caught:
        parse_spec(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["quest:page=8,page=16"])
def test_a_parameter_twice_is_refused(text: str) -> None:
    with pytest.raises(RetraceError, match="page"):
        parse_spec(text)


def test_braces_stand_for_each_value() -> None:
    def named(*texts: str) -> list[str]:
        return [str(spec) for spec in parse_specs(texts)[0]]

    assert named("quest:page={8,16, 32}", "exact") == [
        "quest:page=8", "quest", "quest:page=32", "exact"
    ]  # fmt: skip
    assert named("sparq:rank={8,16},keep={none,sink:4+recent:0.25k}") == [
        "sparq:keep=none,rank=8",
        "sparq:keep=sink:4+recent:0.25k,rank=8",
        "sparq:keep=none,rank=16",
        "sparq:keep=sink:4+recent:0.25k,rank=16",
    ]
    assert named("{exact,window}") == ["exact", "window"]


def test_a_grid_is_counted_before_it_is_made() -> None:
    values = "{" + ",".join(map(str, range(1000))) + "}"
    with pytest.raises(RetraceError, match="1,000,000,000,000 combinations"):
        parse_specs([f"quest:page={values},a={values},b={values},c={values}"])


@pytest.mark.parametrize("text", ["quest:page={8,16", "quest:page=8}", "quest:page={{8,16}}"])
def test_braces_that_do_not_match(text: str) -> None:
    with pytest.raises(RetraceError, match="expected values in braces"):
        parse_specs([text])
