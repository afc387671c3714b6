"""Each number of a plan with its value, formula and origin: for `megagpt plan --explain`."""

from collections.abc import Iterator

from megagpt.placement import sharer
from megagpt.planning.amounts import wrapped
from megagpt.planning.plan import Plan
from megagpt.planning.state import held_parameters
from megagpt.planning.terms import Term

# Parts of the peak -> their formulas. P: stored parameters of a tensor rank's part of the model; N: tokens of a
# micro-batch; C, L, V: width, layers, padded vocabulary; a: bytes of a number in the precision of matrix products.
_MEMORY = {
    "weights": "4 P; FSDP: divided by the ranks that share a copy; ZeRO: a P, at stage 3 divided by the ranks",
    "gradients": (
        "4 P, divided by the ranks that share them, or of the blocks done so far if a step has one micro-batch; ZeRO: "
        "and the buckets that stay"
    ),
    "optimizer": "8 P of Adam's moments, divided by the ranks that share them; ZeRO: and 4 P of fp32 weights",
}
_COUNTED = "this code's own tensors, counted"


def plan_terms(plan: Plan) -> list[Term]:
    """Memory, speed and bill of a plan."""
    memory, gpu, config, model = plan.memory, plan.cluster.gpu, plan.config, plan.config.model
    size = config.micro_batch
    terms = [
        Term(name, size, "bytes", _MEMORY.get(name, memory.moment), _COUNTED) for name, size in memory.parts.items()
    ]
    slack = "2.5 GB of CUDA, NCCL and libraries + 6% of what is not state"
    terms.append(Term("reserve", memory.reserve, "bytes", slack, "experience"))
    terms.append(Term("memory of the GPU", gpu.memory, "bytes", "", dict(gpu.origins).get("memory", "")))
    terms += [
        Term("P", held_parameters(model, config.engine.tensor_ranks), "", "stored parameters", "config"),
        Term("C, L, T", model.width, "", f"width; {model.layers:,} layers; context {model.context:,}", "config"),
        Term("V", model.padded_vocab_size, "", "rows of the vocabulary, padded", "config"),
        Term("N", size * model.context, "tokens", f"of a micro-batch: {size:,} x {model.context:,}", "config"),
        Term("M", plan.accumulation, "", f"micro-batches of a {sharer(config)} in a step", "config"),
        *plan.speed.terms,
    ]
    terms.append(Term("tokens", config.train.tokens, "", "train.tokens", "config"))
    ramp = "each step as long as its number of micro-batches asks for, less the time of as many tokens in full batches"
    terms.append(Term("batch ramp", plan.ramp_seconds, "s", ramp, "computed"))
    terms.append(Term("time", plan.seconds, "s", "tokens / (tokens/s) + batch ramp", "computed"))
    terms.append(Term("GPU-hours", plan.gpu_hours, "h", f"time x {plan.cluster.gpus:,} GPUs", "computed"))
    if plan.cost is not None and plan.price is not None:
        terms.append(Term("price", plan.price, "$/h", "of a GPU", "given"))
        terms.append(Term("cost", plan.cost, "$", "GPU-hours x price", "computed"))
    if plan.energy is not None:
        terms.append(Term("power", gpu.watts, "W", "of a GPU, at its largest", dict(gpu.origins).get("watts", "")))
        terms.append(
            Term("energy", plan.energy, "kWh", "GPU-hours x power; without hosts, network, cooling", "computed")
        )
    return terms


def explained(plan: Plan) -> Iterator[str]:
    """Lines with all terms."""
    yield "Terms: value; formula; (origin)"
    for term in plan_terms(plan):
        value = f"{term.value:,.6g} {term.unit}".strip()
        words = "; ".join(filter(None, [value, term.formula]))
        yield from wrapped(f"{words} ({term.origin})" if term.origin else words, label=term.name, indent=31)
