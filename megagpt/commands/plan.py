"""config, models: what a run will be."""

import argparse

from megagpt.commands.options import Add, count


def register(add: Add) -> None:
    sub = add("config", _config, "Show a resolved run and what is derived from it.")
    sub.add_argument("config", metavar="CONFIG")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    sub.add_argument("--ranks", type=count, default=1, help="world size to derive accumulation for (1)")

    add("models", _models, "List the papers' sizes.")


def _config(arguments: argparse.Namespace) -> int:
    from megagpt.config_file import load_config, to_yaml
    from megagpt.planning.summary import summarize

    config = load_config(arguments.config, arguments.overrides)
    summary = summarize(config, arguments.ranks)
    print(to_yaml(config))
    print("\n".join(f"# {line}" for line in summary))
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from megagpt.models.presets import PRESETS

    print(
        f"{'name':12}{'layers':>7}{'width':>7}{'heads':>10}{'context':>9}{'parameters':>17}{'batch':>11}{'lr':>9}{'FLOPs':>11}"
    )
    for name, preset in PRESETS.items():
        m = preset.model
        lr = f"{preset.peak_lr:.1e}" if preset.peak_lr else "-"
        flops = f"{preset.paper_flops:.2e}" if preset.paper_flops else "-"
        print(
            f"{name:12}{m.layers:7}{m.width:7}{f'{m.heads} x {m.head_width}':>10}{m.context:9}"
            f"{m.parameters:17,}{preset.batch_tokens:11,}{lr:>9}{flops:>11}"
        )
    print("batch: tokens; lr: the paper's peak; FLOPs: 6 x parameters x the paper's 300B tokens; -: not published")
    return 0
