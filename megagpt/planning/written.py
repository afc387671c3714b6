"""A plan as a config file."""

from megagpt.config_file import to_yaml
from megagpt.planning.answer import Question
from megagpt.planning.lines import plan_words, start_command
from megagpt.planning.plan import Plan


def config_text(question: Question, plan: Plan, file: str) -> str:
    """A config with the plan's setting, every key spelled out, under comments with the plan. It reads back as the
    plan's config. `file`: the name that it gets."""
    comments = [
        f"Written by `megagpt plan` from {' '.join([question.name, *question.given])}.",
        plan_words(plan),
        f"Start: {start_command(question, plan, file)}",
    ]
    # A line break in an override would end the comment.
    lines = "".join(f"# {' '.join(comment.splitlines())}\n" for comment in comments)
    return lines + to_yaml(plan.config)
