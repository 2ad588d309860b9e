"""`python -m benchmarks.readme`: write the tables of README.md and docs/ from benchmarks/results and the registry.

A page marks a table with `<!-- measured: NAME -->`, or `listed` where it comes from the code, and its end with
`<!-- end -->`; what stands between is replaced.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.class_order import order_table
from benchmarks.cpu import forward_table, training_table
from benchmarks.decoupled import table as decoupled_table
from benchmarks.filter_accuracy import accuracy_table
from benchmarks.filter_training import training_table as filter_training_table
from benchmarks.fourier import fourier_page
from benchmarks.inputs import Softmax, describe
from benchmarks.loss_table import loss_table, option_table
from benchmarks.number_tokens import overhead_table
from benchmarks.report import RESULTS, markdown_table
from benchmarks.scaling import scaling_table
from benchmarks.spherical import spherical_table
from benchmarks.spherical_losses import table as spherical_losses_table
from benchmarks.vq import vq_table
from recipes.extreme_classification.compare import about as extreme_about
from recipes.extreme_classification.compare import table as extreme_table
from recipes.forecasting.report import table as forecasting_table
from recipes.forecasting.toy_report import toy_table
from recipes.one_billion_word.codebooks import codebook_table
from recipes.one_billion_word.ranking import comparison

ROOT = Path(__file__).parent.parent
FORECASTING = ROOT / "recipes" / "forecasting"
EXTREME = ROOT / "recipes" / "extreme_classification"
ONE_BILLION_WORD = ROOT / "recipes" / "one_billion_word"
BLOCK = re.compile(r"(<!-- (?:measured|listed): (?P<name>[\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def where(record: dict) -> str:
    """On what, with which versions and when something was measured."""
    environment = record["environment"]
    device = environment["cpu"] if environment["device"] == "cpu" else environment["device"]
    return f"{device}, {environment['threads']} threads, torch {environment['torch']}, {environment['date'][:10]}"


def inputs_line(record: dict) -> str:
    """Shape and kind of the inputs."""
    inputs = record["inputs"]
    shape = ", ".join(f"{name} {inputs[name]:,}" for name in "NVD")
    softmax = Softmax(inputs["kept_share"], inputs["kept_mass"], inputs["entropy"], inputs["perplexity"])
    return f"{inputs['source']}: {shape}, {inputs['dtype'].removeprefix('torch.')}; {describe(softmax)}"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def cpu_training() -> str:
    record = load("cpu")
    return f"{where(record)}. {inputs_line(record)}.\n\n{training_table(record['training'], record['logits_bytes'])}"


def cpu_forward() -> str:
    return forward_table(load("cpu")["forward"])


def cpu_random() -> str:
    record = load("cpu")
    return training_table(record["random"], record["logits_bytes"])


def filter_accuracy() -> str:
    record = load("filter_accuracy")
    return f"{where(record)}. {inputs_line(record)}.\n\n{accuracy_table(record['filter'])}"


def class_order() -> str:
    record = load("class_order")
    return f"{inputs_line(record)}.\n\n{order_table(record['orders'])}"


def filter_training() -> str:
    record = load("filter_training")
    configuration = record["configuration"]
    about = (
        f"{configuration['data']}, V {configuration['classes']:,}, D {configuration['width']}, "
        f"{configuration['steps']:,} steps of {configuration['batch'] * configuration['length']:,} tokens"
    )
    return f"{about}; torch {record['environment']['torch']}, {record['environment']['date'][:10]}.\n\n" + (
        filter_training_table(record["runs"])
    )


def number_tokens() -> str:
    record = load("number_tokens")
    share = f"{record['number_share']:.0%} of the labels are numbers"
    return f"{where(record)}. {inputs_line(record)}; {share}.\n\n{overhead_table(record['losses'])}"


def vq() -> str:
    record = load("vq")
    shape = ", ".join(f"{name} {size:,}" for name, size in record["shape"].items())
    return f"{where(record)}. {shape}, float32.\n\n{vq_table(record['sizes'])}"


def spherical() -> str:
    record = load("spherical")
    return f"{where(record)}. N {record['shape']['N']}, D {record['shape']['D']}, float32.\n\n" + (
        spherical_table(record["steps"])
    )


def spherical_losses() -> str:
    record = load("spherical_losses")
    shape = record["inputs"]
    return f"{where(record)}. V {shape['V']:,}, D {shape['D']}, float32.\n\n{spherical_losses_table(record['steps'])}"


def decoupled() -> str:
    record = load("decoupled")
    inputs = ", ".join(f"{name} {value:,}" for name, value in record["inputs"].items())
    return f"{where(record)}. {inputs}.\n\n{decoupled_table(record['decoupled'])}"


def coverage() -> str:
    record = load("coverage")
    rows = [[kind, count] for kind, count in record["counts"].items()]
    return f"transformers {record['transformers']}, {record['date']}.\n\n" + markdown_table(
        ["outcome", "classes"], rows
    )


def fourier() -> str:
    record = load("fourier")
    return f"{where(record)}; width {record['width']}.\n\n{fourier_page(record)}"


def forecasting() -> str:
    record = json.loads((FORECASTING / "results" / "results.json").read_text())
    about = (
        f"{record['data']}: {record['series']} series, {record['data_options']['bins']} bins, "
        f"context {record['data_options']['context']}, horizon {record['data_options']['horizon']}, width "
        f"{record['model']['hidden_size']}, {record['model']['layers']} layers, {record['steps']} steps of "
        f"{record['batch_size']} windows; {record['test_windows']} windows to test on, {record['run']['samples']} "
        f"paths each; torch {record['torch']}, transformers {record['transformers']}."
    )
    return f"{about}\n\n```\n{forecasting_table(record['runs'])}```"


def forecasting_toy(name: str = "toy") -> str:
    record = json.loads((FORECASTING / "results" / f"{name}.json").read_text())
    options = record["options"]
    about = (
        f"{options['samples']:,} samples, {options['epochs']} epochs, learning rate {options['learning_rate']:g}, "
        f"{options['schedule']}; torch {record['torch']}."
    )
    return f"{about}\n\n```\n{toy_table(record)}```"


def extreme_classification() -> str:
    record = json.loads((EXTREME / "results" / "results.json").read_text())
    return f"{extreme_about(record)}.\n\n```\n{extreme_table(record)}```"


def ranking() -> str:
    return comparison(json.loads((ONE_BILLION_WORD / "results" / "ranking.json").read_text())).rstrip()


def codebooks() -> str:
    return codebook_table(json.loads((ONE_BILLION_WORD / "results" / "codebooks.json").read_text())).rstrip()


TABLES: dict[str, Callable[[], str]] = {
    "cpu.training": cpu_training,
    "cpu.forward": cpu_forward,
    "cpu.random": cpu_random,
    "filter_accuracy": filter_accuracy,
    "filter_training": filter_training,
    "class_order": class_order,
    "number_tokens": number_tokens,
    "vq": vq,
    "spherical": spherical,
    "spherical_losses": spherical_losses,
    "decoupled": decoupled,
    "coverage": coverage,
    "fourier": fourier,
    "forecasting": forecasting,
    "forecasting.toy": forecasting_toy,
    "extreme_classification": extreme_classification,
    "forecasting.toy_dense": partial(forecasting_toy, "toy_dense"),
    "codebooks": codebooks,
    "ranking": ranking,
    "losses": loss_table,
    "loss_options": option_table,
    "scaling": scaling_table,
}


def rendered(text: str) -> str:
    """The page with every marked table written anew.

    Raises:
        ValueError: a mark names no known table.
    """

    def replace(match: re.Match) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}; known are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name]()}\n{match[3]}"

    return BLOCK.sub(replace, text)


def pages() -> list[Path]:
    recipes = [folder / "README.md" for folder in (FORECASTING, EXTREME, ONE_BILLION_WORD)]
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *recipes]


def main() -> None:
    for page in pages():
        old = page.read_text()
        new = rendered(old)
        page.write_text(new)
        print(f"{page.relative_to(ROOT)}: {'written' if new != old else 'unchanged'}")


if __name__ == "__main__":
    main()
