"""sample: text from a model."""

import argparse
import codecs
from typing import TYPE_CHECKING, Any

from megagpt.commands.options import Add, add_device, add_model
from megagpt.errors import UserError

if TYPE_CHECKING:
    import torch


def register(add: Add) -> None:
    sub = add("sample", _sample, "Continue prompts with a run's newest checkpoint, or with OpenAI's GPT-2.")
    add_model(sub)
    sub.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    sub.add_argument("--samples", type=int, default=1, help="continuations of each prompt (1)")
    sub.add_argument("--max-tokens", type=int, default=64, help="new tokens in each (64)")
    sub.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1.0)")
    sub.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest tokens; 0: all (50)")
    sub.add_argument("--top-p", type=float, default=1.0, help="probability of the likeliest tokens to draw from (1.0)")
    sub.add_argument("--seed", type=int, default=0, help="decides what is drawn (0)")
    sub.add_argument("--stream", action="store_true", help="print tokens as they come, one continuation after another")
    sub.add_argument("--slide", action="store_true", help="keep the end of a prompt that is longer than the context")
    add_device(sub)


def _sample(arguments: argparse.Namespace) -> int:
    from megagpt.console import warn
    from megagpt.data.tokenizer import gpt2
    from megagpt.exchange.named import open_model
    from megagpt.generation import generate
    from megagpt.process_memory import keep_freed_memory
    from megagpt.world import World, check_device

    checks = {
        "--temperature must not be negative": arguments.temperature >= 0,
        "--top-k must not be negative": arguments.top_k >= 0,
        "--top-p must be above 0 and at most 1": 0 < arguments.top_p <= 1,
        "--samples must be at least 1": arguments.samples > 0,
        "--max-tokens must be at least 1": arguments.max_tokens > 0,
        "--seed must not be negative": arguments.seed >= 0,
    }
    if refused := [message for message, holds in checks.items() if not holds]:
        raise UserError(refused[0])
    check_device(arguments.device, "--device")
    world = World.alone(arguments.device)
    if world.device.type == "cpu":
        keep_freed_memory()
    model = open_model(arguments.model).load().to(world.device).eval()
    context = model.config.context
    texts = [p for p in arguments.prompt or ["Hello, I'm a language model,"] for _ in range(arguments.samples)]
    prompts = []
    for text in texts:
        tokens = gpt2().encode_ordinary(text) or [gpt2().eot_token]
        if len(tokens) > context:
            if not arguments.slide:
                way = f"shorten it, or let --slide keep its last {context}"
                raise UserError(f"the prompt has {len(tokens)} tokens, the model's context is {context}: {way}")
            warn(f"the prompt has {len(tokens)} tokens: its last {context} are used")
            tokens = tokens[-context:]
        prompts.append(tokens)
    if max(map(len, prompts)) + arguments.max_tokens > context:
        warn(f"past the context of {context} tokens the window slides by half of it")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    if arguments.stream:
        for i, (text, tokens) in enumerate(zip(texts, prompts, strict=True)):
            _stream(model, text, tokens, arguments.max_tokens, {**settings, "seed": arguments.seed, "first_row": i})
        return 0
    rows = generate(model, model.config, prompts, arguments.max_tokens, seed=arguments.seed, **settings)
    print("\n---\n".join(text + gpt2().decode(row) for text, row in zip(texts, rows, strict=True)))
    return 0


def _stream(model: "torch.nn.Module", text: str, tokens: list[int], count: int, settings: dict[str, Any]) -> None:
    from megagpt.data.tokenizer import gpt2
    from megagpt.generation import generate

    # A character may span several tokens: print it when its last byte has arrived.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(row: int, token: int) -> None:
        print(decoder.decode(gpt2().decode_single_token_bytes(token)), end="", flush=True)

    print(text, end="", flush=True)
    try:
        generate(model, model.config, [tokens], count, on_token=show, **settings)  # type: ignore[arg-type]
    finally:
        print(decoder.decode(b"", final=True), flush=True)
