"""Plans as lines for people, at most 110 characters wide."""

import shlex
from collections.abc import Iterator

from megagpt.placement import sharer
from megagpt.planning.amounts import energy, gigabytes, large, money, seconds, time, whole, wrapped
from megagpt.planning.answer import Answer, Question
from megagpt.planning.explain import explained
from megagpt.planning.gpus import CPU, Cluster
from megagpt.planning.plan import Plan
from megagpt.planning.setting import setting_words
from megagpt.planning.tables import best_of, table

# Columns in front of a plan's numbers.
_LABEL = 15


def answer_lines(answer: Answer, explain: bool) -> Iterator[str]:
    """All of an answer. `explain`: with each term of the plan as configured, or of the recommended one."""
    yield from _run_lines(answer.question)
    yield ""
    if not answer.question.fixed:
        yield from _clusters_lines(answer)
        if answer.plans:
            yield from ["", *_settings_lines(answer)]
        if explain and answer.explained is not None:
            yield from ["", plan_words(answer.explained), *explained(answer.explained)]
        return
    if answer.own is not None:
        yield f"As configured: {setting_words(answer.own.config, answer.own.cluster.gpus)}"
        yield from plan_lines(answer.own)
        yield ""
    yield from _advice(answer)
    yield ""
    yield from _settings_lines(answer)
    if explain and answer.explained is not None:
        yield from ["", *explained(answer.explained)]


def _settings_lines(answer: Answer) -> Iterator[str]:
    """A ranking of the settings on one cluster."""
    question = answer.question
    shown = answer.plans if question.thorough else best_of(answer.plans, question.compare)
    where = "" if question.fixed else f" on {_gpus(answer.plans[0].cluster)}"
    ranked = question.compare or question.thorough
    yield f"Every setting{where}, the best first:" if ranked else "The best of each engine:"
    yield from table(shown, question.config)


def _run_lines(question: Question) -> Iterator[str]:
    config, model, tokens = question.config, question.config.model, question.config.train.batch_tokens
    batch = f"{tokens:,} ({config.batch_sequences:,} sequences of {model.context:,})"
    name = f"{config.run.name}: {model.parameters:,} parameters"
    yield from wrapped(f"{name}, {large(config.train.tokens)} tokens in batches of {batch}")
    yield from wrapped(_cluster_words(question.cluster, question.fixed))


def _cluster_words(cluster: Cluster, fixed: bool) -> str:
    gpu, each = cluster.gpu, f"of {gigabytes(cluster.gpu.memory)} GB"
    usual = ", which is assumed (--network)" if cluster.network == gpu.network else ""
    network = f"{cluster.network:g} Gbit/s a GPU between nodes{usual}"
    if not fixed:
        return f"on {gpu.name} {each}, nodes of {cluster.per_node}; {network}"
    if cluster.nodes == 1:
        return f"on {cluster.gpus} {gpu.name} {each}, in one node"
    return f"on {cluster.gpus:,} {gpu.name} {each}, in {cluster.nodes:,} nodes of {cluster.per_node}; {network}"


def plan_lines(plan: Plan) -> Iterator[str]:
    """Memory, step, speed, time and bill of one plan."""
    memory, speed, ranks = plan.memory, plan.speed, plan.cluster.gpus
    low, high = plan.range
    peak = f"{gigabytes(memory.total)} GB a {_device(plan.cluster)} at the fullest moment, {memory.moment}: "
    yield from _labelled("memory", peak + fit_words(plan))
    yield from _labelled("", _sum({name: gigabytes(size) for name, size in memory.parts.items()}))
    for note in memory.notes:
        yield from _labelled("", note)
    batches = f"{plan.accumulation} micro-batch{'es' if plan.accumulation > 1 else ''} of each {sharer(plan.config)}"
    parts = _sum({name: seconds(taken) for name, taken in speed.seconds.items()})
    yield from _labelled("step", f"{seconds(speed.step)} for {batches}: {parts}")
    if speed.hidden_exchange > 0.005 * speed.step:
        yield from _labelled("", f"beside them {seconds(speed.hidden_exchange)} of exchange that computation hides")
    facts = [f"{large(speed.tokens_per_second)} tokens/s ({large(speed.range[0])} to {large(speed.range[1])})"]
    facts += [f"{large(speed.tokens_per_second / ranks)} a GPU"] if ranks > 1 else []
    facts += [] if plan.cluster.gpu.name == CPU else [f"MFU {speed.mfu:.0%}"]  # a CPU's peak is nominal
    yield from _labelled("speed", ", ".join(facts))
    days = f"{time(plan.days)} ({time(low * plan.days)} to {time(high * plan.days)})"
    extra = f" (validations: up to {validating:.1%})" if (validating := _validating(plan)) > 0.001 else ""
    yield from _labelled("time", f"{days}; validations, exams, samples and saves come on top{extra}")
    bill = _hours(plan)
    if plan.cost is not None:
        spread = f"{money(low * plan.cost)} to {money(high * plan.cost)}"
        bill += f" at ${plan.price:g} = {money(plan.cost)} ({spread})"
    used = "" if plan.energy is None else f"; {energy(plan.energy)} for the GPUs at full power"
    yield from _labelled("bill", bill + used)
    if plan.config.train.batch_ramp_tokens:
        yield from _labelled("batch ramp", _ramp_words(plan))
    yield from _labelled("evidence", speed.evidence)


def _hours(plan: Plan) -> str:
    return f"{whole(plan.gpu_hours)} {_device(plan.cluster)}-hours"


def _device(cluster: Cluster) -> str:
    """Whose memory and hours are counted: ranks share a CPU."""
    return "rank" if cluster.gpu.name == CPU else "GPU"


def _validating(plan: Plan) -> float:
    """Time of the validations as a share of the steps' time: forward passes, of the three or four that a step takes."""
    validation, again = plan.config.validation, plan.config.train.activation_checkpointing == "full"
    return validation.tokens / validation.every_tokens / (4 if again else 3) if validation.every_tokens else 0.0


def _ramp_words(plan: Plan) -> str:
    config, shares = plan.config, plan.config.shares(plan.cluster.gpus)
    share, start = plan.ramp_seconds / plan.seconds, config.train.batch_ramp_start // config.model.context
    cost = "" if plan.cost is None else f", {money(share * plan.cost)}"
    why = f"its first steps have {start:,} sequences"
    if shares > start:
        of = "ranks" if config.engine.tensor_ranks == 1 else "groups of tensor ranks"
        why += f", which take as long as {shares:,}, one for each of the {of}"
    return f"{time(share * plan.days)} of the time{cost} ({share:.1%}): {why}"


def fit_words(plan: Plan) -> str:
    """The verdict, with what is left or missing."""
    reserve, capacity = f"a reserve of {gigabytes(plan.memory.reserve)} GB", plan.cluster.gpu.memory
    match plan.verdict:
        case "fits":
            return f"fits, with {reserve} and {gigabytes(plan.spare)} GB to spare"
        case "tight":
            return f"tight, because {reserve} needs {gigabytes(-plan.spare)} GB more than is left"
    return f"does not fit this code: a {_device(plan.cluster)} has {gigabytes(plan.memory.total - capacity)} GB less"


def _advice(answer: Answer) -> Iterator[str]:
    """The recommended setting in a sentence, and what to type."""
    question, best, own = answer.question, answer.best, answer.own
    if best is None:
        yield from _nothing_fits(answer)
    elif best is own:
        tight = "" if best.verdict == "fits" else "; it is tight, and nothing else fits"
        yield f"Recommended: as configured; no setting is faster by more than 1%{tight}."
    else:
        facts = [
            time(best.days),
            _hours(best),
            *([] if best.cost is None else [money(best.cost)]),
        ]
        words = f"{setting_words(best.config, best.cluster.gpus)}: {', '.join(facts)}"
        words += f" instead of {time(own.days)}" if own is not None and own.verdict == "fits" else ""
        words += "" if best.verdict == "fits" else "; it is tight, and nothing else fits"
        yield from wrapped(f"Recommended: {words}. Start it with:")
        yield "  " + start_command(question, best)
    if question.days is not None and best is not None:
        yield from wrapped(_deadline_words(answer, question.days, best))


def _nothing_fits(answer: Answer) -> Iterator[str]:
    least = min(answer.plans, key=lambda plan: plan.memory.total)
    cluster, need = least.cluster, setting_words(least.config, least.cluster.gpus)
    words = f"No setting of this code fits on {cluster.gpus:,} {cluster.gpu.name}; the one that needs least is {need}, "
    yield from wrapped(f"{words}with {gigabytes(least.memory.total)} GB a GPU.")
    smallest = answer.clusters.smallest if answer.clusters else None
    if smallest is not None:
        yield from _choice("Smallest cluster that fits", answer.question, smallest)


def _deadline_words(answer: Answer, days: float, best: Plan) -> str:
    if best.days <= days:
        sure = best.days * best.range[1] <= days
        return f"In {days:g} days: yes" + ("." if sure else "; at the slow end of the range no.")
    found = answer.clusters.in_time(days) if answer.clusters else None
    if found is None:
        return f"In {days:g} days: no, and on no other number of these GPUs."
    return f"In {days:g} days: no; {found.cluster.gpus:,} GPUs take {time(found.days)}."


def _clusters_lines(answer: Answer) -> Iterator[str]:
    question, clusters = answer.question, answer.clusters
    assert clusters is not None
    if not clusters.plans:
        yield "No setting of this code fits on any number of these GPUs over which the batch can be divided."
        return
    yield "The best setting on each number of GPUs that divides the batch and has room for it:"
    yield from table(clusters.plans, question.config, by_gpus=True)
    yield ""
    chosen = {"smallest that fits": clusters.smallest, "cheapest": clusters.cheapest}
    if question.days is not None:
        chosen[f"smallest that needs at most {question.days:g} days"] = clusters.in_time(question.days)
    for plan in dict.fromkeys(map(id, filter(None, chosen.values()))):
        names = [name for name, other in chosen.items() if id(other) == plan]
        (found,) = {id(other): other for other in chosen.values() if id(other) == plan}.values()
        assert found is not None
        yield from _choice(" and ".join(names).capitalize(), question, found)
    if question.days is not None and clusters.in_time(question.days) is None and clusters.fastest is not None:
        fastest = clusters.fastest
        words = f"No number of these GPUs needs at most {question.days:g} days; the fastest, {fastest.cluster.gpus:,}, "
        yield from wrapped(f"{words}takes {time(fastest.days)}.")


def _choice(label: str, question: Question, plan: Plan) -> Iterator[str]:
    setting = setting_words(plan.config, plan.cluster.gpus)
    yield from wrapped(f"{label}: {_gpus(plan.cluster)}, {setting}: {_bill(plan)}. Start it with:")
    yield "  " + start_command(question, plan)


def _gpus(cluster: Cluster) -> str:
    return f"{cluster.gpus:,} {_device(cluster)}{'s' if cluster.gpus > 1 else ''}"


def _bill(plan: Plan) -> str:
    facts = [time(plan.days), _hours(plan)]
    return ", ".join(facts if plan.cost is None else [*facts, money(plan.cost)])


def plan_words(plan: Plan) -> str:
    """The whole plan in one line."""
    cluster = plan.cluster
    nodes = f", {cluster.nodes:,} nodes of {cluster.per_node}" if cluster.nodes > 1 else ""
    words = f"{cluster.gpus:,} {cluster.gpu.name}{nodes}: {setting_words(plan.config, cluster.gpus)}; "
    words += f"{gigabytes(plan.memory.total)} of {gigabytes(cluster.gpu.memory)} GB"
    price = "" if plan.price is None else f" at ${plan.price:g} an hour"
    return f"{words}, {large(plan.speed.tokens_per_second)} tokens/s, {_bill(plan)}{price}"


def start_command(question: Question, plan: Plan, file: str | None = None) -> str:
    """The command that starts the run with a plan's setting on its cluster. `file`: a config that has the setting."""
    cluster, words = plan.cluster, [file] if file else [question.name]
    if not file:
        words += question.overrides(plan)
    if cluster.nodes > 1:
        nodes = ["--nodes", str(cluster.nodes), "--gpus-per-node", str(cluster.per_node)]
        return shlex.join(["megagpt", "launch", "slurm", *words, *nodes])
    if cluster.gpus > 1:
        return shlex.join(["torchrun", "--nproc-per-node", str(cluster.gpus), "launch/train.py", *words])
    return shlex.join(["megagpt", "train", *words])


def _labelled(label: str, text: str) -> list[str]:
    return wrapped(text, label, _LABEL)


def _sum(parts: dict[str, str]) -> str:
    return " + ".join(f"{name} {value}" for name, value in parts.items())
