"""Plans as values for JSON: bytes, seconds, dollars, kilowatt-hours and shares."""

import dataclasses
from typing import Any

from megagpt.config import Config
from megagpt.planning.answer import Answer, Question
from megagpt.planning.explain import plan_terms
from megagpt.planning.gpus import CPU, Cluster
from megagpt.planning.lines import start_command
from megagpt.planning.plan import Plan
from megagpt.planning.tables import best_of


def answer_record(answer: Answer, explain: bool = False) -> dict[str, Any]:
    """All of an answer. `explain`: with the terms of the plan as configured, or of the recommended one."""
    question, config, clusters = answer.question, answer.question.config, answer.clusters

    def plan(found: Plan | None) -> dict[str, Any] | None:
        return None if found is None else plan_record(found, question)

    record: dict[str, Any] = {
        "run": run_record(config),
        "cluster": cluster_record(question.cluster, question.fixed),
        "price": question.price,
        "as_configured": plan(answer.own),
        "recommended": plan(answer.best),
        "settings": [plan(one) for one in (answer.plans if question.thorough else best_of(answer.plans, by_mode=True))],
    }
    if clusters is not None:
        record["clusters"] = {
            "smallest": plan(clusters.smallest),
            "cheapest": plan(clusters.cheapest),
            "fastest": plan(clusters.fastest),
            "in_time": plan(clusters.in_time(question.days)) if question.days else None,
            "all": [plan(one) for one in clusters.plans],
        }
    if explain and answer.explained is not None:
        record["terms"] = [term._asdict() for term in plan_terms(answer.explained)]
    return record


def plan_record(plan: Plan, question: Question) -> dict[str, Any]:
    """One plan. Its `overrides`, typed after the config's name, give its setting; `start` is the whole command."""
    memory, speed, train = plan.memory, plan.speed, plan.config.train
    low, high = plan.range
    return {
        "gpus": plan.cluster.gpus,
        "engine": dataclasses.asdict(plan.config.engine),
        "activation_checkpointing": train.activation_checkpointing,
        "micro_batch": plan.config.micro_batch,
        "accumulation": plan.accumulation,
        "overrides": question.overrides(plan),
        "start": start_command(question, plan),
        "memory": {
            "moment": memory.moment,
            "parts": memory.parts,
            "state": memory.state,
            "total": memory.total,
            "reserve": memory.reserve,
            "notes": list(memory.notes),
        },
        "fits": plan.verdict != "does not fit",
        "verdict": plan.verdict,
        "spare": plan.spare,
        "step_seconds": speed.step,
        "step_parts": speed.seconds,
        "hidden_exchange_seconds": speed.hidden_exchange,
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_range": list(speed.range),
        "mfu": None if plan.cluster.gpu.name == CPU else speed.mfu,
        "evidence": speed.evidence,
        "days": plan.days,
        "days_range": [plan.days * low, plan.days * high],
        "gpu_hours": plan.gpu_hours,
        "cost": plan.cost,
        "cost_range": None if plan.cost is None else [plan.cost * low, plan.cost * high],
        "energy_kwh": plan.energy,
        "ramp_days": plan.ramp_seconds / 86_400,
    }


def cluster_record(cluster: Cluster, fixed: bool) -> dict[str, Any]:
    """The hardware that was assumed. `fixed`: the number of GPUs is given."""
    gpu = cluster.gpu
    figures = {field.name: getattr(gpu, field.name) for field in dataclasses.fields(gpu) if field.name != "origins"}
    return {
        "gpu": gpu.name,
        "gpus": cluster.gpus if fixed else None,
        "per_node": cluster.per_node,
        "network_gbits": cluster.network,
        "network_assumed": cluster.network == gpu.network,
        "figures": figures,
        "origins": dict(gpu.origins),
    }


def run_record(config: Config) -> dict[str, Any]:
    """The run: its model, tokens and batch."""
    model = config.model
    return {
        "name": config.run.name,
        "parameters": model.parameters,
        "flops_per_token": model.flops_per_token,
        "tokens": config.train.tokens,
        "batch_tokens": config.train.batch_tokens,
        "context": model.context,
    }
