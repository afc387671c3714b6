"""config, models: a run before it starts, the config's keys, and the papers' sizes."""

import argparse

from megagpt.commands.options import Add, add_config, config_of, count


def register(add: Add) -> None:
    sub = add("config", _config, "Show a resolved run and what is derived from it, or explain the config's keys.")
    add_config(sub)
    text = "number of ranks to derive the accumulation for (default: the fewest with which the engine can start)"
    sub.add_argument("--ranks", type=count, help=text)
    text = "explain every key, or those with WORD in their name or text; needs no CONFIG"
    sub.add_argument("--keys", nargs="?", const="", metavar="WORD", help=text)

    add("models", _models, "List the papers' sizes.")


def _config(arguments: argparse.Namespace) -> int:
    if arguments.keys is not None:
        from megagpt.config_keys import find_keys

        for key in find_keys(arguments.keys):
            print("\n".join(key.lines()))
        return 0
    from megagpt.config_file import to_yaml
    from megagpt.data.mixture import describe_if_here
    from megagpt.planning.summary import summarize

    config = config_of(arguments)
    ranks = arguments.ranks or config.engine.shard_ranks or config.engine.tensor_ranks
    lines = [*describe_if_here(config), *summarize(config, ranks)]
    print(to_yaml(config))
    print("\n".join(f"# {line}" for line in lines))
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from megagpt.models.presets import PRESETS

    row = "{:12}{:>7}{:>7}{:>10}{:>9}{:>17}{:>11}{:>9}{:>11}".format
    print(row("name", "layers", "width", "heads", "context", "parameters", "batch", "lr", "FLOPs"))
    for name, preset in PRESETS.items():
        m = preset.model
        lr = f"{preset.peak_lr:.1e}" if preset.peak_lr else "-"
        flops = f"{preset.paper_flops:.2e}" if preset.paper_flops else "-"
        heads, parameters, batch = f"{m.heads} x {m.head_width}", f"{m.parameters:,}", f"{preset.batch_tokens:,}"
        print(row(name, m.layers, m.width, heads, m.context, parameters, batch, lr, flops))
    print("batch: tokens; lr: the paper's peak; FLOPs: 6 x parameters x the paper's 300B tokens; -: not published")
    return 0
