"""The comment with a plan at the top of each config. `python -m tests.planning.presets` writes them after a change of
the formulas."""

from megagpt.config_file import load_config
from megagpt.planning.amounts import gigabytes, large, money, time
from megagpt.planning.gpus import Cluster, find_gpu
from megagpt.planning.plan import Plan, make_plan
from tests.processes import REPOSITORY

PRICE = 2.5
SMALL = ("gpt2_124m", "gpt2_124m_40b", "gpt2_124m_fineweb", "gpt2_355m", "gpt2_774m", "gpt2_1558m",
         "gpt3_125m", "gpt3_350m", "gpt3_760m")  # fmt: skip
GPUS = {**dict.fromkeys(SMALL, (8,)), "gpt3_xl": (8, 64), "gpt3_2.7b": (8, 64), "gpt3_6.7b": (64,), "gpt3_13b": (64,),
        "gpt3_175b": (1024,)}  # fmt: skip
"""Config -> numbers of H100s for which it is set."""
START = "# Plan for "


def planned(name: str, gpus: int) -> Plan:
    return make_plan(load_config(name), Cluster(find_gpu("h100"), gpus), PRICE)


def comment(name: str) -> str:
    """The lines of the plans, as they stand in the config's file."""
    lines = []
    for gpus in GPUS[name]:
        plan = planned(name, gpus)
        memory = f"{gigabytes(plan.memory.total)} of {gigabytes(plan.cluster.gpu.memory)} GB"
        assert plan.cost is not None
        bill = f"{time(plan.days)} and {money(plan.cost)} at ${PRICE:.2f} a GPU-hour"
        lines.append(f"{START}{gpus} H100s: {memory}, {bill} for {large(plan.config.train.tokens)} tokens.\n")
    return "".join(lines)


def main() -> None:
    for name in GPUS:
        path = REPOSITORY / "configs" / f"{name}.yaml"
        kept = [line for line in path.read_text().splitlines(keepends=True) if not line.startswith(START)]
        path.write_text(comment(name) + "".join(kept))


if __name__ == "__main__":
    main()
