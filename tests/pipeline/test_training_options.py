"""What a recipe says of a training is what the training is given, and what its saved states are compared by."""

import json
import subprocess
import sys

import pytest
from conftest import distill_with, make_blocks, make_model

from cascade.distillation.losses.divergences import DIVERGENCES, Options
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.options import Execution, Features, Objective, OnPolicy, Optimization, Safekeeping
from cascade.distillation.schedule import SCHEDULES, Schedule
from cascade.models.architecture.origin import Origin
from cascade.pipeline.training_options import execution_of, optimization_of, safekeeping_of, supervision_of
from cascade.recipe.distill import Distill

CHANGED = {
    "batch_size": 6, "microbatch_size": 3, "schedule": "wsd", "decay_fraction": 0.3, "warmup_fraction": 0.1,
    "final_learning_rate_fraction": 0.2, "weight_decay": 0.4, "max_grad_norm": 2.0, "loss": "jsd", "temperature": 3.0,
    "temperature_scale": "none", "beta": 0.7, "skew": 0.6, "top_k": 9, "cross_entropy_weight": 0.8, "ema_decay": 0.9,
    "gradient_checkpointing": True, "compile": True, "save_every_minutes": 1.0, "keep_states": 4, "on_nan": "skip",
    "max_skipped": 5, "on_divergence": "stop",
    "on_policy": {"fraction": 0.5, "prompt_tokens": 4, "max_new_tokens": 6, "temperature": 0.3, "loss": "tvd",
                  "buffer_size": 2, "replay_fraction": 0.1},
}  # fmt: skip


def test_every_key_of_a_section_reaches_the_option_that_it_names(tmp_path):
    section = Distill(tokens=1, **CHANGED)
    supervision = supervision_of(section, vocab_size=60)
    assert supervision.objective == Objective("jsd", 3.0, "none", 0.8, Options(0.7, 0.6, 9), 60)
    assert supervision.on_policy == OnPolicy(0.5, 4, 6, 0.3, "tvd", 2, 0.1)
    optimization = optimization_of(section, learning_rate=0.01, optimizer="muon", seed=7, first_position=8)
    assert optimization == Optimization(
        batch_size=6, seed=7, first_position=8, optimizer="muon", learning_rate=0.01,
        schedule=Schedule("wsd", 0.1, 0.2, 0.3), weight_decay=0.4, max_grad_norm=2.0, ema_decay=0.9,
    )  # fmt: skip
    assert execution_of(section) == Execution(microbatch_size=3, gradient_checkpointing=True, compiled=True)
    assert safekeeping_of(section, tmp_path) == Safekeeping(
        state_folder=tmp_path, save_every_minutes=1.0, keep_states=4, on_nan="skip", max_skipped=5, on_divergence="stop"
    )


def test_a_section_that_says_nothing_comes_to_the_defaults_of_the_options():
    section = Distill(tokens=1)
    assert supervision_of(section).objective == Objective() and supervision_of(section).on_policy is None
    optimization = optimization_of(section, learning_rate=3e-3, optimizer="adamw", seed=0)
    assert (optimization, execution_of(section), safekeeping_of(section)) == (
        Optimization(),
        Execution(),
        Safekeeping(),
    )


@pytest.mark.parametrize(("key", "table"), [("loss", DIVERGENCES), ("schedule", SCHEDULES)])
def test_what_a_table_names_a_recipe_can_name(key, table):
    assert [Distill(tokens=1, **{key: name}).model_dump()[key] for name in table] == list(table)
    with pytest.raises(ValueError, match=" or ".join(f"'{name}'" for name in list(table)[-2:])):
        Distill(tokens=1, **{key: "another"})


def test_a_recipe_is_read_without_torch():
    code = "import sys, cascade.recipe.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_state_names_its_training_as_states_on_disks_do(tmp_path):
    class Killed(BaseException):
        """Stands for a death that no handler sees."""

    def dies(done, total):
        raise Killed

    student, teacher = make_model(seed=2), make_model(seed=1)
    features = Features("cosine", relations=("qq",), weights={"hidden": 2.0})
    with pytest.raises(Killed):
        distill_with(
            student, teacher, make_blocks(24), num_tokens=8 * 16 * 3, learning_rate=1e-2, weight_decay=0.1,
            ema_decay=0.9, seed=3, first_position=5, objective=Objective("jsd", 2.0, vocab_size=64),
            schedule=Schedule("wsd", 0.1, 0.2, 0.3), on_policy=OnPolicy(0.5, 4, 6),
            features=FeatureLoss(features, Origin((0, 1, 2, 3)), student, teacher),
            state_folder=tmp_path, save_every_minutes=0, on_step=dies,
        )  # fmt: skip
    (state,) = tmp_path.glob("step-*/state.json")
    # A change of any of these texts makes trainings that were stopped start again.
    assert json.loads(state.read_text())["settings"] == {
        "num_steps": 3,
        "batch_size": 8,
        "learning_rate": 0.01,
        "seed": 3,
        "first_position": 5,
        "weight_decay": 0.1,
        "objective": "Objective(divergence='jsd', temperature=2.0, temperature_scale='tsq', cross_entropy_weight=0.0, "
        "options=Options(beta=0.5, skew=0.1, top_k=64))",
        "schedule": "Schedule(kind='wsd', warmup_fraction=0.1, final_fraction=0.2, decay_fraction=0.3)",
        "max_grad_norm": 1.0,
        "optimizer": "adamw",
        "ema_decay": 0.9,
        "features": "Features(hidden='cosine', embedding=None, relations=('qq',), relation_heads=None, "
        "weights={'hidden': 2.0}, balanced=True, fade_fraction=None)",
        "on_policy": "OnPolicy(fraction=0.5, prompt_tokens=4, max_new_tokens=6, temperature=1.0, "
        "divergence='reverse_kl', buffer_size=0, replay_fraction=0.5)",
        "vocab_size": 64,
    }
