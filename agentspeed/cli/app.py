"""The commands and their options; what they do is in the modules beside this one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from agentspeed import __version__
from agentspeed.cli.engine_flags import (
    BatchInvariant,
    Context,
    Dp,
    Dtype,
    Ep,
    HostSlots,
    KvCacheDtype,
    Pages,
    Revision,
    Settings,
    Tp,
    Weights,
    at_revision,
    engine_options_of,
)
from agentspeed.cli.statuses import EXIT_REFUSED, reported, run

app = typer.Typer(
    name="agentspeed",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Agent sessions on a session-aware inference engine.\n\n"
    "Examples:  agentspeed chat  ·  agentspeed chat ./model --tools tools.py  ·  agentspeed top",
)
Model = Annotated[str | None, typer.Argument(help="A model folder or repository id; nothing: the shipped model.")]
ChatModel = Annotated[
    str | None,
    typer.Argument(help="A model folder, a repository id or a server's address; nothing: the shipped model."),
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"agentspeed {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Takes the options that no command has."""


@app.command()
def chat(
    model: ChatModel = None,
    revision: Revision = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            help="A Python file; its @tool functions become tools, or all its typed public ones when none has @tool."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 512,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this alone, print the answer alone, and end.")
    ] = None,
    pages: Pages = None,
    dtype: Dtype = None,
    weights: Weights = None,
    kv_cache_dtype: KvCacheDtype = None,
    batch_invariant: BatchInvariant = False,
    context: Context = None,
    host_slots: HostSlots = None,
    tp: Tp = 1,
    dp: Dp = 1,
    ep: Ep = None,
    settings: Settings = None,
) -> None:
    """Talk to a model; each answer shows what was resumed and computed. Ctrl-C cancels the answer, Ctrl-D ends.

    Example:  agentspeed chat
    Example:  agentspeed chat ./model --tools tools.py --temperature 0.7
    Example:  agentspeed chat -p "Name a colour." > colour.txt

    In the chat, /help lists its commands. Lines from a pipe are answered one after the other; then the status is 2 when
    one of them failed."""
    with reported():
        options = engine_options_of(
            settings,
            pages=pages,
            dtype=dtype,
            weights=weights,
            kv_cache_dtype=kv_cache_dtype,
            batch_invariant=batch_invariant,
            context_limit=context,
            host_slots=host_slots,
            tp=tp,
            dp=dp,
            ep=ep,
        )
        at = at_revision(model, revision)
    if prompt is not None:
        from agentspeed.cli.one_shot import one_shot

        run(
            lambda: one_shot(
                at, prompt, tools=tools, system=system, temperature=temperature, max_tokens=max_tokens, options=options
            )
        )
        return
    from agentspeed.cli.chat import Chat

    with reported():
        chat = Chat(at, tools=tools, system=system, temperature=temperature, max_tokens=max_tokens, options=options)
        done = chat.run()
    if not done:
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def serve(
    model: Model = None,
    revision: Revision = None,
    host: Annotated[str, typer.Option(help="Where to listen; other than this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="AGENTSPEED_API_KEY", help="SECRET, or TENANT:SECRET; may be given several times."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most that one request may ask for.")] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests in work at once.")] = 1024,
    idle_sessions: Annotated[int, typer.Option(min=1, help="Sessions that wait to go on.")] = 256,
    idle_seconds: Annotated[float, typer.Option(min=0, help="For how long they wait.")] = 600.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="What running requests get after SIGTERM.")] = 30.0,
    snapshots: Annotated[
        Path | None,
        typer.Option(help="Folder where sessions wait for the next server; nothing: they end with this one."),
    ] = None,
    pages: Pages = None,
    dtype: Dtype = None,
    weights: Weights = None,
    kv_cache_dtype: KvCacheDtype = None,
    batch_invariant: BatchInvariant = False,
    context: Context = None,
    host_slots: HostSlots = None,
    tp: Tp = 1,
    dp: Dp = 1,
    ep: Ep = None,
    settings: Settings = None,
    otel: Annotated[bool, typer.Option("--otel", help="Trace turns with OpenTelemetry's global providers.")] = False,
) -> None:
    """Serve a model over HTTP to OpenAI's and Anthropic's clients; each conversation finds its session and its rows.

    Example:  agentspeed serve
    Example:  agentspeed serve ./model --port 9000 --api-key team-a:secret1 --api-key team-b:secret2

    Ends at Ctrl-C or SIGTERM, once running requests have ended or their time is over."""
    from agentspeed.cli.serve import serve as served

    with reported():
        engine = engine_options_of(
            settings,
            pages=pages,
            dtype=dtype,
            weights=weights,
            kv_cache_dtype=kv_cache_dtype,
            batch_invariant=batch_invariant,
            context_limit=context,
            host_slots=host_slots,
            tp=tp,
            dp=dp,
            ep=ep,
        )
        served(
            model,
            revision=revision,
            host=host,
            port=port,
            keys=api_key or [],
            engine=engine,
            otel=otel,
            max_tokens=max_tokens,
            max_requests=max_requests,
            idle_sessions=idle_sessions,
            idle_seconds=idle_seconds,
            drain_seconds=drain_seconds,
            snapshots=None if snapshots is None else str(snapshots),
        )


@app.command()
def engine(
    model: Model = None,
    revision: Revision = None,
    socket: Annotated[Path | None, typer.Option(help="Where to be found; nothing: a private place.")] = None,
    pages: Pages = None,
    dtype: Dtype = None,
    weights: Weights = None,
    kv_cache_dtype: KvCacheDtype = None,
    batch_invariant: BatchInvariant = False,
    context: Context = None,
    host_slots: HostSlots = None,
    tp: Tp = 1,
    dp: Dp = 1,
    ep: Ep = None,
    settings: Settings = None,
) -> None:
    """Start an engine that several programs attach to: it prints the line that sets AGENTSPEED_ENGINE for them.

    Example:  agentspeed engine
    Example:  agentspeed engine ./model --socket /tmp/my-agents/engine.sock --set max_sessions=64

    Ends at Ctrl-C or SIGTERM with status 0; with 2 when the engine cannot start, or ended by itself."""
    from agentspeed.cli.engine import engine as started

    with reported():
        options = engine_options_of(
            settings,
            pages=pages,
            dtype=dtype,
            weights=weights,
            kv_cache_dtype=kv_cache_dtype,
            batch_invariant=batch_invariant,
            context_limit=context,
            host_slots=host_slots,
            tp=tp,
            dp=dp,
            ep=ep,
        )
        started(model, revision=revision, socket=socket, options=options)


@app.command()
def demo(model: Model = None) -> None:
    """A session in half a minute: a turn, four forks, an adoption, a rewind, and what each of them cost.

    Example:  agentspeed demo
    Example:  agentspeed demo ./model"""
    from agentspeed.cli.demo import demonstrate

    run(lambda: demonstrate(model))


@app.command()
def env(model: Model = None) -> None:
    """Versions, the machine, the model, and every engine option with its default.

    Example:  agentspeed env
    Example:  agentspeed env ./model"""
    from agentspeed.cli.env import describe

    async def show() -> None:
        typer.echo(describe(model))

    run(show)


@app.command()
def kernels(
    model: Annotated[
        str | None, typer.Argument(help="A model folder, a config.json or a repository id; nothing: the shipped model.")
    ] = None,
    revision: Revision = None,
    explain: Annotated[
        list[str] | None, typer.Option(help="An op, or `all`: why each other kernel does not run it. May be repeated.")
    ] = None,
    platform: Annotated[
        str | None,
        typer.Option(help="Another than this CPU: cuda, cpu:avx512, cpu:avx2, cpu:torch, cuda:90, cuda:100."),
    ] = None,
    dtype: Dtype = None,
    weights: Weights = None,
    kv_cache_dtype: KvCacheDtype = None,
    batch_invariant: BatchInvariant = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Which kernel runs each op of a model here, for how many rows, and why the others do not. No weights are read.

    Example:  agentspeed kernels
    Example:  agentspeed kernels ./model --explain linear --explain gqa_rows
    Example:  agentspeed kernels ./model --platform cuda:100 --dtype bfloat16"""
    from agentspeed.cli.kernels import described

    with reported():
        typer.echo(
            described(
                model,
                revision=revision,
                explain=explain or [],
                platform=platform,
                dtype=dtype,
                weights=weights,
                kv_cache_dtype=kv_cache_dtype,
                batch_invariant=batch_invariant,
                as_json=as_json,
            )
        )


@app.command()
def models(
    model: Annotated[
        str | None, typer.Argument(help="A model folder or repository id; nothing: the families that run.")
    ] = None,
    revision: Revision = None,
    check_template: Annotated[
        bool, typer.Option("--check-template", help="Play random conversations of every kind against the template.")
    ] = False,
    conversations: Annotated[int, typer.Option(min=1, help="Of each kind, with --check-template.")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """What a model is, what it needs here and how its template is spoken: reasoning, tools, calls, and what is refused
    and why. Of a repository configurations and the tokenizer are fetched, never weights.

    Example:  agentspeed models
    Example:  agentspeed models ./model
    Example:  agentspeed models ./model --check-template

    The status is 2 for a model that does not run or cannot be talked to, and, with --check-template, when a
    conversation is not in the log as the template writes it, id by id."""
    from agentspeed.cli.models import Shown, listed

    with reported():
        if model is None and not check_template:
            typer.echo(listed(as_json=as_json))
            return
        shown = Shown(model, revision=revision, conversations=conversations if check_template else 0)
        typer.echo(json.dumps(shown.fields(), ensure_ascii=False) if as_json else shown.text())
    if not shown.sound:
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="A model folder, or a config.json; weights need not be there.")],
    tp: Annotated[
        int | None, typer.Option(min=1, help="Ranks that cut heads, widths and the vocabulary; nothing: 1.")
    ] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Ranks with sessions of their own; nothing: 1.")] = None,
    ep: Annotated[
        int | None, typer.Option(min=1, help="Groups of ranks with experts of their own; nothing: every rank.")
    ] = None,
    exchange: Annotated[
        Literal["auto", "sum", "all_to_all"], typer.Option(help="How rows find their experts; auto: what costs less.")
    ] = "auto",
    spare_experts: Annotated[int, typer.Option(min=0, help="Further copies of experts.")] = 0,
    machine: Annotated[
        str | None, typer.Option(help="h100 or h200: a mesh is chosen for it, and taken where tp and dp are not given.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Of the machine; nothing: 8.")] = None,
    sessions: Annotated[int, typer.Option(min=1, help="That run at once, for the choice of a mesh.")] = 64,
    memory: Annotated[str | None, typer.Option(help="Of one GPU, as 141GB or 80GiB; nothing: the machine's.")] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the sessions that are counted; nothing: the largest context, for the "
            "choice of a mesh 8192.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32", "float64"], typer.Option(help="Of weights, activations and cache.")
    ] = "bfloat16",
    weights: Annotated[
        Literal["dtype", "fp8"] | None, typer.Option(help="Of the matrices alone: 8 bits, or dtype, as nothing is.")
    ] = None,
    kv_cache_dtype: KvCacheDtype = None,
    rows: Annotated[int, typer.Option(min=1, help="Tokens of a dp rank in the step that is shown.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with every step, for programs.")] = False,
) -> None:
    """How a model lies on several GPUs: each step with its shapes on a rank, what ranks send each other and what of it
    is fused, bytes of weights and cache on each GPU, the largest context, where the next cut fails, and which mesh a
    machine should have by a cost model. Nothing is loaded.

    Example:  agentspeed plan ./model --tp 8 --memory 141GB
    Example:  agentspeed plan ./model --machine h200 --gpus 16 --context 32768
    Example:  agentspeed plan bench/models/deepseek-v3.json --tp 4 --dp 4 --memory 141GB --json"""
    from agentspeed.cli.plan import described

    with reported():
        typer.echo(
            described(
                model,
                tp=tp,
                dp=dp,
                ep=ep,
                exchange=exchange,
                spare_experts=spare_experts,
                machine=machine,
                gpus=gpus,
                sessions=sessions,
                dtype=dtype,
                weights=weights,
                kv_cache_dtype=kv_cache_dtype,
                rows=rows,
                memory=memory,
                context=context,
                as_json=as_json,
            )
        )


@app.command()
def top(
    socket: Annotated[Path | None, typer.Argument(help="An engine's socket; nothing: every engine of yours.")] = None,
    once: Annotated[bool, typer.Option("--once", help="One frame, then end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a frame, for programs.")] = False,
    branches: Annotated[int | None, typer.Option(min=0, help="Most branches shown of each engine.")] = None,
) -> None:
    """Watch running engines: sessions, branches, where their rows are, leases, pages, and why something waits.

    Example:  agentspeed top
    Example:  agentspeed top --once --json

    Ends at Ctrl-C with status 0; with 2 when no engine runs, with 3 when all that were watched have ended."""
    from agentspeed.cli.top import Top

    watch = Top(socket, branches=branches, as_json=as_json)
    with reported():
        if once:
            watch.once()
            return
        status = watch.watch()
    raise typer.Exit(status)


@app.command()
def replay(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A recording (a folder `….flight`), or one of its segments; "
            "nothing: list what engines that ended badly left."
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Stop at this step and print the whole state.")] = None,
) -> None:
    """Run a recorded engine run again through the scheduling core: one line of state per step.

    Example:  agentspeed replay
    Example:  agentspeed replay flights/20260901-120000-4711-0a1b.flight --step 42

    Ends with status 0 when the replay is the recorded run; with 1 where it differs, naming step and field; with 2 for
    what is no recording."""
    from agentspeed.cli.replay import list_crashes
    from agentspeed.cli.replay import replay as replayed

    with reported():
        status = list_crashes(step) if file is None else replayed(file, step)
    raise typer.Exit(status)


@app.command(context_settings={"allow_interspersed_args": False})  # what follows the name is the benchmark's
def bench(
    name: Annotated[str | None, typer.Argument(help="Name of a benchmark; nothing: list them.")] = None,
    options: Annotated[list[str] | None, typer.Argument(help="Passed on to the benchmark.")] = None,
) -> None:
    """Run a benchmark of the repository; its last line is JSON. What follows its name is passed on to it.

    Example:  agentspeed bench
    Example:  agentspeed bench fork --children 4
    Example:  agentspeed bench fork --help"""
    from agentspeed.cli.bench import names, start

    if name is None:
        typer.echo("\n".join(names()) or "No benchmarks here: they are in the repository, not in the wheel.")
        return
    if name not in names():
        typer.echo(
            f"There is no benchmark {name!r}. Known: {', '.join(names()) or 'none outside the repository'}.", err=True
        )
        raise typer.Exit(EXIT_REFUSED)
    passed = options or []
    sys.exit(start(name, passed[1:] if passed[:1] == ["--"] else passed))
