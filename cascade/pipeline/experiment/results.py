"""The result of a finished cell, as a file: its figures, and the recipe, inputs and code behind them; no weights."""

import hashlib
import json
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from cascade import __version__
from cascade.models.checkpoint.load import fingerprint, resolve_model
from cascade.pipeline.experiment.cells import Cell, lacks_row
from cascade.planning.inputs import data_fingerprint, production_fingerprint, task_fingerprint
from cascade.planning.ownership import resolved_recipe
from cascade.planning.parent import existing_parent
from cascade.recipe.distill import WITHOUT_EFFECT
from cascade.recipe.names import owner_of
from cascade.recipe.prune import Prune
from cascade.recipe.schema import Calibration, Recipe
from cascade.report.block_sums import load_block_sums
from cascade.report.rates import is_at_edge, load_rates
from cascade.report.records import Row, family_of, load_family
from cascade.runtime.files import read_json, write_atomically
from cascade.store.commits import MANIFEST, read_manifest
from cascade.store.stage_table import STAGES
from cascade.store.strict_json import plain

VERSION = 1

_METRIC_KEYS = ("task", "metric", "filter", "value", "stderr", "n", "higher_is_better", "chance", "retention")

_NO_MATTER = ("output", "acknowledged", "baselines", "finish", "evaluate.at_least", "distill.cache.folder",
              *(f"distill.{key}" for key in WITHOUT_EFFECT))  # fmt: skip
"""Keys of a recipe that no figure of a member depends on."""

Result = dict[str, Any]


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keys that figures depend on, as dotted keys, without folders of this machine."""
    flat = _flat(resolved_recipe(recipe, [], public=True), "")
    settings = {
        key: value
        for key, value in flat.items()
        if not f"{key}.".startswith(tuple(f"{prefix}." for prefix in _NO_MATTER))
    }
    if "ce" in recipe.baseline_kinds and recipe.ce_learning_rate != "auto":
        settings["baselines.ce.learning_rate"] = recipe.ce_learning_rate
    return settings


def inputs_of(recipe: Recipe) -> dict[str, str]:
    """The sha256 of each input of a recipe: parent, text, tasks, students."""
    unread: dict[str, Any] = {
        "distill": None,
        "members": [],
        "baselines": [],
        "seed": 0,
        "prune": Prune(),
        "calibration": Calibration(),
    }
    only = recipe.model_copy(update=unread)
    students = {f"student {member.name}": _model_sha256(member.student) for member in recipe.members if member.student}
    return _inputs(only.model_dump_json()) | students


def collect_result(cell: Cell, folder: Path, inputs: dict[str, str]) -> Result:
    """The result of a cell, from its finished family in `folder`."""
    rows, blocks, rates = family_of(load_family(folder)).rows, load_block_sums(folder), load_rates(folder)
    names = [member.name for member in cell.members]
    by_name = {row.name: row for row in rows}
    results = [by_name["parent"], *(by_name[name] for name in names)]
    results += [row for row in rows if row.role == "baseline"]
    manifests = [read_json(path) for path in sorted(folder.glob(f"stages/*/{MANIFEST}"))]
    trained = read_json(folder / "members" / names[-1] / "cascade.json")["stages"]["distilled"]["folder"]
    made_with = read_json(folder / trained / MANIFEST)["made_with"]
    return {
        "version": VERSION,
        "cell": {"arm": cell.arm, "seed": cell.seed, "tokens": cell.tokens},
        "recipe": settings_of(cell.recipe),
        "inputs": inputs,
        "formats": {
            manifest["stage"]: STAGES[manifest["stage"]].format for manifest in manifests if manifest["stage"] in STAGES
        },
        "made_with": {key: value for key, value in made_with.items() if key != "process"} | code_version(),
        "weights": {name: _weights_sha256(folder / "members" / name) for name in names},
        "rows": [_row(row, by_name, names, blocks.get(row.name), rates.get(row.name)) for row in results],
    }


def write_result(path: Path, result: Result) -> None:
    """Write a result with a sha256 of its content, one row per line."""
    result = plain(result)
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in result["rows"])
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1, allow_nan=False)
    text = f'{head[:-2]},\n "sha256": "{_sha256(result)}",\n "rows": [\n{rows}\n ]\n}}\n'
    write_atomically(path, text)


def read_result(path: Path, cell: Cell, inputs: dict[str, str]) -> tuple[Result | None, str]:
    """(the result of a cell, ''), or (None, the reason why the file is not it); the reason is '' without a file."""
    if not path.is_file():
        return None, ""
    try:
        result = read_json(path)
        if result.pop("sha256") != _sha256(result):
            return None, "is not as it was written"
        if result["version"] != VERSION:
            return None, f"is of version {result['version']}; this program reads {VERSION}"
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None, "is cut off or no result"
    formats = {stage.name: stage.format for stage in STAGES.values()}
    different = [
        *_differences("recipe", result["recipe"], json.loads(json.dumps(settings_of(cell.recipe)))),
        *_differences("inputs", result["inputs"], inputs),
        *_differences("formats", result["formats"], {stage: formats.get(stage) for stage in result["formats"]}),
    ]
    if different:
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        return None, f"is of something else: {'; '.join(different[:4])}{more}"
    rows = {(row["member"], row["kind"]) for row in result["rows"]}
    for member in cell.members:
        for kind in ("member", *cell.recipe.baseline_kinds):
            if (member.name, kind) not in rows and not lacks_row(cell.recipe, member.member, kind):
                return None, f"lacks the row {member.name}{'' if kind == 'member' else f'-{kind}'}"
    return result, ""


@lru_cache(maxsize=1)
def code_version() -> dict[str, str]:
    """The package's version and, from a git checkout, its commit; a '+' after the commit means uncommitted changes."""
    folder = Path(__file__).parents[2]
    version = {"cascade": __version__}
    try:
        git = ["git", "-C", str(folder)]
        tracked = ["ls-files", "--error-unmatch", "__init__.py"]  # an installed package can lie inside another checkout
        subprocess.run([*git, *tracked], check=True, capture_output=True, timeout=20)
        commit, changed = (
            subprocess.run([*git, *command], check=True, capture_output=True, text=True, timeout=20).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "."])
        )
    except (OSError, subprocess.SubprocessError):
        return version  # installed, or without git
    return version | {"commit": commit + ("+" if changed else "")}


def _row(
    row: Row, by_name: dict[str, Row], names: list[str], blocks: dict[str, Any] | None, rate: dict[str, Any] | None
) -> dict[str, Any]:
    """A row of family.json with its block sums; the accumulated tokens of a baseline include those of its start."""
    member = row.name if row.role == "member" else owner_of(row.name, names) if row.role == "baseline" else ""
    hop, accumulated = row.tokens.hop, row.tokens.cumulative
    if row.role == "baseline":
        whole = by_name[member].tokens
        accumulated = whole.cumulative - whole.hop + hop
    return {
        "name": row.name,
        "member": member,
        "kind": {"teacher": "parent", "member": "member"}.get(row.role) or row.name[len(member) + 1 :],
        "num_parameters": row.num_parameters,
        "tokens": {"hop": hop, "accumulated": accumulated},
        "rate": {key: rate[key] for key in ("learning_rate", "searched", "num_tokens")} | {"edge": is_at_edge(rate)}
        if rate
        else None,
        "metrics": [{key: getattr(metric, key) for key in _METRIC_KEYS} for metric in row.metrics],
        "blocks": _rounded(blocks) if blocks else None,
    }


def _rounded(blocks: dict[str, Any]) -> dict[str, Any]:
    """Block sums in seven significant digits, the precision of float32."""
    return {
        name: [float(f"{value:.7g}") for value in values] if name not in ("text", "tokens") else values
        for name, values in blocks.items()
    }


def _weights_sha256(folder: Path) -> dict[str, str]:
    files = read_manifest(folder)
    return {name: entry["sha256"] for name, entry in sorted(files.items()) if name.endswith(".safetensors")}


@lru_cache(maxsize=16)
def _inputs(recipe_json: str) -> dict[str, str]:
    recipe = Recipe.model_validate_json(recipe_json)
    parent = existing_parent(recipe)
    if parent is None:
        raise ValueError("an experiment has a parent that is there")
    digests = {"parent": fingerprint(parent), "text": data_fingerprint(recipe.data), "tasks": task_fingerprint(recipe)}
    return digests | ({"production": production_fingerprint(recipe.data)} if recipe.data.production else {})


@lru_cache(maxsize=16)
def _model_sha256(reference: str) -> str:
    return fingerprint(resolve_model(reference))


def _sha256(result: Result) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _differences(section: str, stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    keys = [key for key in sorted(stored.keys() | current.keys()) if stored.get(key) != current.get(key)]
    return [
        f"{section}.{key}: {_short(stored.get(key, 'absent'))} there, {_short(current.get(key, 'absent'))} now"
        for key in keys
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _flat(value: Any, place: str) -> dict[str, Any]:
    """A nested recipe as dotted keys such as 'distill.tokens'; members by name, other lists whole."""
    if place == "members":
        value = {member["name"]: member for member in value}
    if not isinstance(value, dict):
        return {place: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flat(part, f"{place}.{key}" if place else key)
    return flat
