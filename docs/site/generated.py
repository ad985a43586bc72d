"""Write the pages that are made from the source: methods, metrics, public names, and the configuration reference.

The package is read as text, by griffe, and never imported: the site builds without torch.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

# Places of the configuration, in the order of the page: what stands there, the keys, and the classes that may.
PLACES = (
    ("The run", "model", ("training.LitUnlearn", "training.LitFinetune", "training.LitEvaluate")),
    ("The language model", "model.lm", ("models.LanguageModel",)),
    ("Objectives", "model.forget", ()),
    ("Constraints", "model.constraints.NAME", ("dual.Constraint",)),
    ("The bound", "model.constraints.NAME.epsilon", ("dual.Relative",)),
    ("Multipliers", "model.constraints.NAME.multiplier", ("dual.DualAscent", "dual.PIMultiplier", "dual.FixedMultiplier")),
    ("The learning-rate schedule", "model.scheduler", ("training.Schedule",)),
    ("Robustness", "model.robustness", ("training.robustness.SharpnessAware", "training.robustness.GradientProjection")),
    ("Data", "data", ("data.base.ForgetRetain", "data.tofu.TOFU", "data.muse.MUSE", "data.lume.LUME", "data.fictional_authors.FictionalAuthors")),
    ("The rows of a set", "data.forget", ("data.source.Source",)),
    ("The chat template", "data.chat", ("data.templates.Chat",)),
    ("The export", "export", ("callbacks.ExportModel",)),
    ("The report", "report", ("callbacks.RunReport",)),
    ("The pictures", "picture", ("callbacks.RunPicture",)),
    ("Files for the loggers", "attach", ("callbacks.AttachFiles",)),
    ("The logs", "logs", ("cli.trainer.Logs",)),
    ("The audit's policy", "audit", ("callbacks.audit.AuditPlan",)),
    ("A limit of damage", "damage", ("callbacks.StopAtDamage",)),
    (
        "Benchmarks",
        "model.benchmark",
        (
            *("evaluation.qa.QABenchmark", "evaluation.tofu.TOFUBenchmark", "evaluation.muse.MUSEBenchmark"),
            "evaluation.question_sets.QuestionSets",
            *("evaluation.lume.LUMEBenchmark", "evaluation.leakage.LeakBenchmark", "evaluation.stress.StressBenchmark"),
            "evaluation.harness.LMEvalBenchmark",
        ),
    ),
    ("Sampled answers", "model.benchmark.sampling", ("models.sampling.Sampling",)),
    ("Relearning", "model.benchmark.relearn", ("evaluation.attacks.relearning.Relearn",)),
)  # fmt: skip


class Sources:
    """The package as griffe reads it, and its names."""

    def __init__(self) -> None:
        package = griffe.load("lit_unlearn", search_paths=[ROOT], docstring_parser="google")
        self.package = package
        self.objectives = _list_exports(self, "objectives")
        self.metrics = _list_exports(self, "metrics")
        stub = ast.parse((ROOT / "lit_unlearn/__init__.pyi").read_text("utf-8"))
        imports = [statement for statement in stub.body if isinstance(statement, ast.ImportFrom)]
        self.public = {alias.name: f"{line.module}.{alias.name}" for line in imports for alias in line.names}

    def get(self, path: str) -> Any:
        """Return the object of a dotted path below the package, behind its aliases."""
        target = self.package[path.removeprefix("lit_unlearn.")]
        return target.final_target if target.is_alias else target


def _list_exports(sources: Sources, module: str) -> list[str]:
    """Return the names that a module has in ``__all__``."""
    return [str(name) for name in sources.package[module].exports]


def build_pages() -> dict[str, str]:
    """Return all generated pages: path below the site's root, and Markdown."""
    sources = Sources()
    return {
        **build_methods(sources),
        **build_metrics(sources),
        **build_api(sources),
        "configuration.md": build_configuration(sources),
    }


# What docstrings say ---------------------------------------------------------------------------------------------------


def read_docstring(target: Any) -> tuple[str, str]:
    """Return the first paragraph of a docstring's text, and the others."""
    sections = target.docstring.parsed if target.docstring else []
    text = "\n\n".join(section.value for section in sections if section.kind.value == "text")
    summary, _, rest = text.partition("\n\n")
    return " ".join(summary.split()), rest


def read_parameters(target: Any) -> list[Any]:
    """Return the arguments that a class documents; inherited ones are named by its docstring."""
    sections = target.docstring.parsed if target.docstring else []
    return [entry for section in sections if section.kind.value == "parameters" for entry in section.value]


def read_constant(target: Any, name: str) -> Any:
    """Return a class attribute that is a literal, its own or an inherited one."""
    for owner in (target, *target.mro()):
        if name in owner.members and owner.members[name].value is not None:
            return ast.literal_eval(str(owner.members[name].value))
    raise LookupError(f"{target.path} has no `{name}`")


def read_needs(objective: Any, settings: dict[str, Any]) -> list[str]:
    """Return what ``lit-unlearn methods`` calls the requirements of an objective."""
    needs = (
        re.findall(r"['\"](\w+)['\"]", str(objective.members["needs"].value)) if "needs" in objective.members else []
    )
    reads = settings.get("reads") or read_constant(objective, "reads")
    return [
        *needs,
        *(["alternate"] if reads != "answer" else []),
        *(["activations"] if "layers" in objective.members else []),
    ]


# Methods ---------------------------------------------------------------------------------------------------------------


def build_methods(sources: Sources) -> dict[str, str]:
    """Return a page per file of configs/method, and their table."""
    choosing = (DOCS / "choosing_a_method.md").read_text("utf-8")
    pages = {}
    rows = ["| method | objective | formula |", "|---|---|---|"]
    for file in sorted((ROOT / "configs/method").glob("*.yaml")):
        model = yaml.safe_load(file.read_text("utf-8"))["model"]
        name = model["forget"]["class_path"]
        formula = read_constant(sources.get(f"objectives.{name}"), "formula")
        rows.append(f"| [{file.stem}]({file.stem}.md) | {link_name(name)} | {formula} |")
        pages[f"method/{file.stem}.md"] = describe_method(sources, file, model, choosing)
    text = (
        "A page per file of `configs/method`. [Choosing a method](../choosing_a_method.md) says which one to take.\n\n"
    )
    return {"method/index.md": f"# Methods\n\n{text}{chr(10).join(rows)}\n", **pages}


def describe_method(sources: Sources, file: Path, model: dict[str, Any], choosing: str) -> str:
    """Return the page of a method."""
    forget = model["forget"]
    objective = sources.get(f"objectives.{forget['class_path']}")
    summary, details = read_docstring(objective)
    needs = set(read_needs(objective, forget.get("init_args", {})))
    retention = []
    for constraint in model["constraints"].values():
        settings = constraint["objective"]
        needs |= set(read_needs(sources.get(f"objectives.{settings['class_path']}"), settings.get("init_args", {})))
        retention.append(f"{link_name(settings['class_path'])} {describe_multiplier(constraint)}")
    stops = read_constant(objective, "stops")
    facts = {
        "formula": read_constant(objective, "formula"),
        "retention": "; ".join(retention),
        "needs": ", ".join(f"`{need}`" for need in sorted(needs)) or "nothing",
        "stops by itself": "yes" if stops else "no: epochs, or the bound, end it",
        "paper": link_papers(read_constant(objective, "paper")),
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items()]
    source = file.read_text("utf-8")
    comment = " ".join(line.removeprefix("# ") for line in source.partition("model:")[0].splitlines())
    page = [
        f"# {file.stem}",
        summary,
        "\n".join([f"| objective | {link_name(objective.name)} |", "|---|---|", *rows]),
        "[What a method may need](../methods.md#what-a-method-may-need) explains the requirements.",
        "## When to use it",
        describe_goals(file.name, choosing, "FixedMultiplier" in source),
        "## How it works",
        link_papers(details),
        link_papers(comment),
        "## How to read the result",
        read_measured(file.stem, choosing),
        "## Run it",
        f"```bash\nlit-unlearn fit --config own_data.yaml --config method/{file.name}\n```",
        f"The file sets these keys; [the configuration](../configuration.md) has all others.\n\n```yaml\n{source}```",
    ]
    return "\n\n".join(part for part in page if part) + "\n"


def describe_multiplier(constraint: dict[str, Any]) -> str:
    """Return in words what a constraint's multiplier does."""
    multiplier = constraint["multiplier"]
    if multiplier["class_path"] != "FixedMultiplier":
        return f"≤ epsilon ({link_name(multiplier['class_path'])})"
    weight = multiplier["init_args"]["weight"]
    return f"with fixed weight {weight}" if weight else "only reported"


def link_name(name: str) -> str:
    """Return the link to a public name's page, from a page in another folder."""
    return f"[{name}](../api/{name}.md)"


def move_links(text: str) -> str:
    """Return a text of docs/ with links that hold from a folder below."""
    return re.sub(r"\]\((?!\w+:|#)", "](../", text)


def link_papers(text: str) -> str:
    """Return a text in which every arXiv number is a link."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def describe_goals(name: str, choosing: str, is_published: bool) -> str:
    """Return the goals for which docs/choosing_a_method.md names a file."""
    rows = [
        line.strip("| ").split(" | ") for line in choosing.partition("\n## ")[0].splitlines() if f"`{name}`" in line
    ]
    goals = [move_links(f"- **{goal}**: {note}") for goal, _, note in rows]
    if not goals and is_published:
        goals = ["- **Numbers to compare with a paper**: λ is fixed, so nothing guarantees that the constraint holds."]
    return "\n".join([*goals, "", "[All goals](../choosing_a_method.md)"])


def read_measured(name: str, choosing: str) -> str:
    """Return the method's row of the table of all methods, with the sentence that says what was measured."""
    table = re.search(r"<!-- begin methods -->.*?(\| method .*?)<!-- end", choosing, re.DOTALL)
    lines = table[1].splitlines() if table else []
    row = [line for line in lines if line.startswith(f"| {name} |")]
    read = "[How the columns are measured](../choosing_a_method.md#all-methods-on-the-same-data), and what other methods do there."
    if not row:
        return f"It is not in the table of methods that need no base model. {read}"
    return "\n".join([f"On the embedded authors, with nothing tuned. {read}", "", *lines[:2], *row])


# Metrics ---------------------------------------------------------------------------------------------------------------


def build_metrics(sources: Sources) -> dict[str, str]:
    """Return a page per name of ``lit_unlearn.metrics``, with the sections of docs/scores.md that name it."""
    scores = re.split(r"(?m)^(?=#{2,3} )", (DOCS / "scores.md").read_text("utf-8"))
    pages = {}
    rows = ["| metric | what it computes |", "|---|---|"]
    for name in sources.metrics:
        target = sources.get(f"metrics.{name}")
        rows.append(f"| [{name}]({name}.md) | {read_docstring(target)[0]} |")
        sections = [section for section in scores if re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", section)]
        if not sections:
            raise LookupError(f"docs/scores.md does not say how to read `{name}`")
        quoted = [re.sub(r"\A#+", "###", section.strip()) for section in sections]
        page = [
            "---",
            f"title: {name}",
            "---",
            "",
            f"::: {target.path}",
            "",
            "## How to read it",
            "",
            move_links("\n\n".join(quoted)),
        ]
        pages[f"metric/{name}.md"] = "\n".join(page) + "\n"
    text = "Functions of plain arrays, and torchmetrics objects. [Scores](../scores.md) explains the values of benchmarks.\n\n"
    return {"metric/index.md": f"# Metrics\n\n{text}{chr(10).join(rows)}\n", **pages}


# Python ----------------------------------------------------------------------------------------------------------------


def build_api(sources: Sources) -> dict[str, str]:
    """Return a page per public name, and their table. A metric has its page among the metrics."""
    pages = {}
    families: dict[str, list[str]] = {}
    for name, path in sorted(sources.public.items(), key=lambda entry: entry[0].lower()):
        target = sources.get(path)
        page = f"../metric/{name}.md" if name in sources.metrics else f"{name}.md"
        family = path.split(".")[1]
        families.setdefault(family, []).append(f"| [{name}]({page}) | {read_docstring(target)[0]} |")
        if name not in sources.metrics:
            pages[f"api/{name}.md"] = f"---\ntitle: {name}\n---\n\n::: {target.path}\n"
    text = "Everything here is imported from `lit_unlearn`, as in `from lit_unlearn import unlearn`. Other names are not public."
    index = ["# Python API", text]
    for family, rows in sorted(families.items(), key=lambda entry: entry[0] != "unlearning"):
        index.append("\n".join([f"## {family.capitalize()}", "", "| name | what it is |", "|---|---|", *rows]))
    return {"api/index.md": "\n\n".join(index) + "\n", **pages}


# Configuration ---------------------------------------------------------------------------------------------------------


def build_configuration(sources: Sources) -> str:
    """Return the page of all keys, from the signatures and docstrings that the command line is made of."""
    page = [(DOCS / "site/configuration.md").read_text("utf-8").strip()]
    for title, place, classes in PLACES:
        page.append(f"## {title}: `{place}` {{ #{place} }}")
        paths = classes or [f"objectives.{name}" for name in sources.objectives if is_objective(sources, name)]
        for path in paths:
            target = sources.get(path)
            page.append(describe_class(sources, target, place, is_family=len(paths) > 1))
    return "\n\n".join(page) + "\n"


def is_objective(sources: Sources, name: str) -> bool:
    """Return whether a name of ``lit_unlearn.objectives`` is a loss that a configuration can name."""
    target = sources.get(f"objectives.{name}")
    return bool(
        target.is_class
        and "forward" in target.members
        and "formula" in target.members
        and read_constant(target, "formula")
    )


def describe_class(sources: Sources, target: Any, place: str, is_family: bool) -> str:
    """Return a class's summary and a definition list of its keys."""
    name = f"[{target.name}](api/{target.name}.md)" if target.name in sources.public else target.name
    # In a family the keys of several classes have the same names: the anchor tells them apart.
    anchor = f"{target.name}." if is_family else f"{place}."
    parts = [f"### {target.name} {{ #{target.name} }}" if is_family else "", f"{read_docstring(target)[0]} ({name})"]
    signatures = {parameter.name: parameter for parameter in target.parameters}
    for parameter in read_parameters(target):
        key = f"`{place}.{parameter.name}`"
        if parameter.name.startswith("*"):
            key = "all other settings"
        signature = signatures.get(parameter.name)
        kind = f"`{parameter.annotation}`" if parameter.annotation is not None else ""
        default = (
            f", default `{signature.default}`"
            if signature is not None and signature.default is not None
            else ", required"
        )
        text = " ".join(parameter.description.split())
        parts.append(f"{key} {{ #{anchor}{parameter.name.strip('*')} }}\n:   {kind}{default}. {text}")
    return "\n\n".join(part for part in parts if part)
