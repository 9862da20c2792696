"""The package's own rules: which room may import which, what stays free of torch, how long and how plain code is."""

import ast
import subprocess
import sys

from conftest import ROOT

PACKAGE = ROOT / "cascade"

ROOMS = "runtime store models data pruning distillation recipe teacher report evaluation planning pipeline cli".split()
"""Each imports only those before it."""


def imports(path):
    """Names of the package's parts that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cascade."):
            yield node.module.split(".")[1]


def outside(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        part = part_of(path)
        if part in ("__init__", "__main__"):
            continue
        for imported in imports(path):
            assert imported == part or ROOMS.index(imported) < ROOMS.index(part), f"{path}: imports {imported}"


def test_some_libraries_are_imported_in_one_place_only():
    allowed = {
        "lm_eval": {"evaluation/tasks_lm_eval/harness.py"},
        "yaml": {"store/strict_yaml.py"},
        "torch_pruning": {"pruning/importance/gradients.py"},
    }
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for library in set(outside(path)) & allowed.keys():
            assert name in allowed[library], f"{name} imports {library}"


def test_report_recipe_and_help_need_no_torch():
    code = (
        "import sys, cascade, cascade.cli.main, cascade.recipe.load, cascade.report.write, cascade.report.card;"
        "assert not {'torch', 'transformers', 'datasets', 'lm_eval'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_F31_no_pickle_is_read_or_written_and_no_text_is_run():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not {"pickle", "joblib", "dill", "shelve"} & set(outside(path)), path
        for word in (
            "torch.load(",
            "torch.save(",
            "allow_pickle",
            "read_pickle",
            "weights_only",
            "trust_remote_code=True",
        ):
            assert word not in text, f"{path}: {word}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not {"load", "save"} & {alias.name for alias in node.names}, path
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("eval", "exec", "compile", "__import__"):
                raise AssertionError(f"{path}:{node.lineno}")


def test_F34_no_text_is_read_or_written_in_the_encoding_of_some_locale():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            named = {argument.arg for argument in node.keywords}
            if name in ("read_text", "write_text"):
                assert "encoding" in named, f"{path}:{node.lineno}"
            if name in ("open", "TemporaryFile", "NamedTemporaryFile"):
                modes = [
                    argument.value
                    for argument in node.args
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                ]
                binary = any("b" in mode for mode in modes) or (name != "open" and not modes)
                assert binary or "encoding" in named or getattr(node.func.value, "id", "") in ("os", "Image"), (
                    f"{path}:{node.lineno}"
                )


PRONOUNS = set(
    "given it item kept made one ones other others own found asked begun said shown thing told tried wanted".split()
)
"""Words that name nothing: a variable is called after what it holds."""

MOST_PRONOUNS = 10
"""Variables and parameters with such names that are left; the number only falls."""

PATCHES = ("setattr", "setitem", "delattr", "delitem")


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def variables(path):
    """Names of the variables that a file assigns and of its functions' parameters."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def private_patches(path):
    """Lines of a test file that replace a name which the package keeps to itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in PATCHES:
            texts = [word.value for word in node.args[:2] if isinstance(word, ast.Constant)]
            names = [text.rpartition(".")[2] for text in texts if isinstance(text, str)]
            yield from (f"{path.name}:{node.lineno}" for name in names if name.startswith("_") and name[1] != "_")


def test_functions_have_at_most_60_lines_and_files_500():
    for path in PACKAGE.rglob("*.py"):
        assert path.read_text().count("\n") <= 500, path
        for node in functions(path):
            name = f"{path.relative_to(PACKAGE).as_posix()}: {node.name}"
            assert node.end_lineno - node.lineno + 1 <= 60, name


def test_variables_are_called_after_what_they_hold():
    pronouns = [f"{path}: {name}" for path in PACKAGE.rglob("*.py") for name in variables(path) if name in PRONOUNS]
    assert len(pronouns) <= MOST_PRONOUNS, pronouns


def test_tests_replace_at_most_five_private_names():
    patches = [patch for path in (ROOT / "tests").rglob("*.py") for patch in private_patches(path)]
    assert len(patches) <= 5, patches
