"""The answer of `megagpt plan`, about a given cluster or about the clusters that a run can have."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.config import Config, EngineConfig
from megagpt.errors import UserError
from megagpt.placement import check_start
from megagpt.planning.gpus import Cluster
from megagpt.planning.plan import Plan, Planner
from megagpt.planning.search import Clusters, find_clusters, own_plan, recommend, search
from megagpt.planning.setting import typed
from megagpt.planning.speed import check_precision


@dataclass(frozen=True)
class Question:
    """A run, and what is asked about it."""

    config: Config
    cluster: Cluster
    """Without a number of GPUs: one node."""
    fixed: bool
    """Whether the number of GPUs is given."""
    planner: Planner
    price: float | None
    """Dollars for an hour of one GPU."""
    name: str
    """The config's, as typed."""
    given: Sequence[str]
    """The overrides, as typed."""
    engine_of_file: EngineConfig
    """The section `engine` of the config's file."""
    days: float | None = None
    compare: bool = False
    """Whether all settings are ranked, and not only the best of each engine."""
    thorough: bool = False
    """Whether they are, with each micro-batch."""

    def overrides(self, plan: Plan) -> list[str]:
        """The overrides that, typed after the config's name, give a plan's setting."""
        return typed(self.given, self.config, plan.config, self.engine_of_file)


@dataclass(frozen=True)
class Answer:
    """Plans for a question."""

    question: Question
    own: Plan | None
    """The config as it is; without a number of GPUs: on the fewest GPUs on which it fits. None if it fits nowhere."""
    best: Plan | None
    """The recommended plan. None if no setting fits."""
    plans: list[Plan]
    """Every plan on the given number of GPUs, the best first; without a number: on the recommended one, if all are
    ranked."""
    clusters: Clusters | None
    """Numbers of GPUs, if they were asked for."""

    @property
    def shown(self) -> Plan:
        """The plan that is drawn and written. Raises UserError if there is none."""
        if self.best is None:
            config, cluster = self.question.config, self.question.cluster
            where = (
                f"{cluster.gpus:,} {cluster.gpu.name}" if self.question.fixed else f"any number of {cluster.gpu.name}"
            )
            raise UserError(f"{config.run.name}: no setting of this code fits on {where}; nothing to write or draw")
        return self.best

    @property
    def explained(self) -> Plan | None:
        """The plan that is explained and traced: as configured, if the number of GPUs is given."""
        return self.own or self.best if self.question.fixed else self.best


def answer(question: Question, with_clusters: bool = False) -> Answer:
    """Plan the run; `with_clusters`: on other numbers of GPUs, too. Raises UserError if the ranks do not divide its
    batch."""
    config, cluster = question.config, question.cluster
    check_precision(config, cluster.gpu)
    if not question.fixed:
        clusters = find_clusters(config, cluster, question.planner)
        in_time = clusters.in_time(question.days) if question.days else None
        own = next((plan for plan in clusters.own if plan.verdict == "fits"), None)
        best = in_time or clusters.cheapest
        ranked = best if question.compare or question.thorough else None
        plans = search(config, ranked.cluster, question.planner, question.thorough, whole=True) if ranked else []
        return Answer(question, own, best, plans, clusters)
    check_start(config, [f"node {1 + gpu // cluster.per_node}" for gpu in range(cluster.gpus)])
    plans = search(config, cluster, question.planner, question.thorough, whole=question.compare)
    own, best = own_plan(plans, config), recommend(plans, config)
    late = question.days is not None and (best is None or best.days > question.days)
    if with_clusters or best is None or late:
        return Answer(question, own, best, plans, find_clusters(config, cluster, question.planner))
    return Answer(question, own, best, plans, None)
