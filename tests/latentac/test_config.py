"""The configuration: strict, complete, and every problem told at once with its path, value and remedy."""

import ast
import inspect
import json

import pytest

from latentac.config import schema as config_module
from latentac.config import validation as validation_module
from latentac.config.extensions import declared_settings
from latentac.config.fields import merge, read_file, read_overrides
from latentac.config.recipes import RECIPES
from latentac.config.schema import Config
from latentac.config.validation import resolve
from latentac.runs.configuration import resolve_recipe
from latentac.runs.resolution import TABLES, resolve_all
from latentac.system.errors import ConfigError
from latentac.system.names import as_name, is_name


def resolved(*overrides: str) -> Config:
    return resolve(merge(RECIPES["shapes-unet"], read_overrides(overrides)))


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve_all(merge(RECIPES["shapes-unet"], read_overrides(overrides)))
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_complete(name):
    """A recipe resolves as it is and carries its own name."""
    assert resolve(RECIPES[name]).recipe == name


def test_overrides_are_typed_and_nested():
    """Values are YAML; 1e-4 is a number, as everyone who types it means."""
    sweep = "steering.methods.value_gradient.sweep=[1, 1.5]"
    config = resolved("policy.learning_rate=1e-4", "seed=7", sweep)
    assert (config.policy.learning_rate, config.seed, config.steering.methods[0].own) == (1e-4, 7, {"sweep": [1, 1.5]})
    assert config.hash != resolved().hash
    assert config.hash == resolved("seed=7", sweep, "policy.learning_rate=0.0001").hash


def test_all_problems_come_at_once_with_path_value_and_remedy():
    """Unknown and misspelt fields, wrong types and missing fields, each with what to do."""
    found = problems("policy.learning_rat=1", "kernel.num_steps=ten", "zzz=1", "rewards=[{weight: 1.0}]")
    assert len(found) == 4
    text = "\n".join(found)
    assert 'policy.learning_rat = 1: unknown field. Did you mean "learning_rate"?' in text
    assert "kernel.num_steps = 'ten': input should be a valid integer" in text
    assert "zzz = 1: unknown field. Known: recipe, project, seed, backbone" in text
    assert "rewards.0.use = None: is required" in text


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["kernel.noise=0"], "kernel.noise", "deterministic"),
        (["algorithm={use: grpo, group_size: 1}"], "algorithm.group_size", "greater than or equal to 2"),
        (["algorithm={use: ddpo, value_gradient: 2}"], "algorithm.value_gradient", "ddpo has no such setting"),
        (["kernel.use=cps"], "kernel.use", "samples flow models, and unet is a variance_preserving one"),
        (["steering.methods.svdd.start=0.9"], "steering.methods.4", "start = 0.9 is not before stop = 0.8"),
        (["train.early_stopping={reward: shapes_verifier}"], "train.early_stopping.reward", "rises to the end"),
        (["train.early_stopping={reward: nothing}"], "train.early_stopping.reward", "not a watched reward"),
        (["algorithm={use: ddpo, baseline: group}"], "algorithm.baseline", "'batch' or 'prompt'"),
        (["policy.ema_decay=1"], "policy.ema_decay", "less than 1"),
        (["critic.body.dropout=1"], "critic.body.dropout", "less than 1"),
        (["algorithm.clip=0"], "algorithm.clip", "greater than 0"),
        (["train.divergence.rate_factor=2"], "train.divergence.rate_factor", "less than or equal to 1"),
        (["algorithm.group_size=3"], "train.block_images", "multiple"),
        (["train.images_per_iteration=250"], "train.images_per_iteration", "blocks of 32"),
        (["train.num_workers=9"], "train.num_workers", "8 blocks"),
        (["train.updates_per_iteration=1000"], "train.updates_per_iteration", "transitions of a block"),
        (["gate.reward=beauty"], "gate.reward", "not a reward of this run"),
        (["rewards=[{use: shapes_verifier, weight: 0}]"], "rewards", "nothing to learn"),
        (["rewards=[{use: shapes_verifier}, {use: shapes_verifier}]"], "rewards", "is the name of two entries"),
        (["critic.body.num_heads=7"], "critic.body", "width = 64 is not a multiple of num_heads = 7"),
        (["policy.learning_rate=-1"], "policy.learning_rate", "greater than 0"),
        (["policy.learning_rate=.nan"], "policy.learning_rate", "finite"),
        (["seed=-1"], "seed", "greater than or equal to 0"),
        (["seed=1.5"], "seed", "integer"),
    ],
)
def test_what_cannot_run_does_not_construct(overrides, path, words):
    """Impossible values and combinations name the field to change."""
    (problem,) = problems(*overrides)
    assert problem.startswith(f"{path} = ")
    assert words in problem


@pytest.mark.parametrize("assignment", ["seed", "=3", "a b=1", "seed=[1"])
def test_a_malformed_override_is_refused(assignment):
    """One message that shows the assignment."""
    with pytest.raises(ConfigError, match="--set"):
        read_overrides([assignment])


@pytest.mark.parametrize(
    ("content", "words"), [("a: [1", "is not YAML"), ("- 1", "does not hold fields"), (None, "cannot be read")]
)
def test_an_unusable_file_is_refused(tmp_path, content, words):
    """Missing, malformed, or of another shape."""
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_file(path)


def test_a_file_lies_between_recipe_and_overrides(tmp_path):
    """Merged field by field, in that order."""
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 3\npolicy:\n  learning_rate: 2e-5\n")
    fields = merge(merge(RECIPES["shapes-unet"], read_file(path)), read_overrides(["seed=4"]))
    config = resolve(fields)
    assert (config.seed, config.policy.learning_rate) == (4, 2e-5)
    assert config.policy.warmup_updates == resolved().policy.warmup_updates


def test_a_configuration_is_frozen():
    """Nothing changes under a run."""
    with pytest.raises(ValueError, match="frozen"):
        resolved().seed = 3


@pytest.mark.parametrize(
    ("overrides", "file", "project"),
    [
        ([], None, "shapes-unet"),
        (["seed=3", "train.num_iterations=2"], None, "shapes-unet"),
        (["recipe=trial of mine"], None, "trial-of-mine"),
        (["backbone.source=/models/my model/"], None, "shapes-unet-my-model"),
        (["gate.reward=jpeg_compressibility"], None, "shapes-unet-jpeg_compressibility"),
        ([], "seed: 3", "mine"),
        ([], "gate: {reward: jpeg_compressibility}", "mine"),
        (["gate.reward=jpeg_compressibility"], "seed: 3", "mine-jpeg_compressibility"),
        ([], "recipe: named in the file", "named-in-the-file"),
        ([], "project: theirs", "theirs"),
        (["project=ours", "backbone.source=elsewhere"], "project: theirs", "ours"),
    ],
)
def test_a_project_is_the_configurations_name(tmp_path, overrides, file, project):
    """Unless it is named: of the recipe or the file, and of what makes it another model than that."""
    path = tmp_path / "mine.yaml"
    path.write_text(file or "")
    assert resolve_recipe("shapes-unet", str(path) if file else "", overrides).project == project


@pytest.mark.parametrize("name", ["../x", ".hidden", "a b", "a/b", "", "files-1", "manifest.json", "x" * 101, "a\n"])
def test_a_project_that_is_no_name_is_refused(name):
    """It is a part of keys in the store, as a run's id is."""
    with pytest.raises(ConfigError, match=r"project = .*is not a valid name\. Use letters"):
        resolve(RECIPES["shapes-unet"] | {"project": name})
    assert is_name(as_name(name))


def test_no_problem_hides_another():
    """Misspelt fields, wrong values, impossible combinations, settings of extensions and names that do not exist are
    reported together, each once."""
    found = problems(
        *("policy.learning_rat=1", "kernel.noise=0", "algorithm.clipp=3", "algorithm.group_size=3"),
        *("rewards.shapes_verifier.weight=0", "backbone.use=nothing", "critic.body.num_heads=7", "gate.reward=x"),
    )
    assert sorted(problem.partition(" = ")[0] for problem in found) == [
        *("algorithm.clipp", "backbone.use", "critic.body", "gate.reward", "kernel.noise", "policy.learning_rat"),
        *("rewards", "train.block_images"),
    ]


def test_misspelt_settings_of_all_tables_are_reported_together_with_the_nearest_name():
    """The framework's fields and those of each extension alike."""
    found = problems(
        *("kernel.noisse=0.5", "algorithm.gea_lambda=1", "critic.body.widht=8", "backbone.sorce=x"),
        "rewards=[{use: shapes_verifier}, {use: shapes_verifier, name: b, wieght: 1, timeout_second: 3}]",
        "steering.methods=[{use: svdd, sweep_partciles: [2]}, {use: best_of_n, strenght: 1}]",
        "tracking=[{use: mlflow, experimnt: x}, {use: wandb, nmae: y}]",
    )
    nearest = {
        problem.partition(" = ")[0]: problem.partition('Did you mean "')[2].partition('"')[0] for problem in found
    }
    assert nearest == {
        "kernel.noisse": "noise",
        "algorithm.gea_lambda": "gae_lambda",
        "critic.body.widht": "width",
        "backbone.sorce": "source",
        "rewards.1.wieght": "weight",
        "rewards.1.timeout_second": "timeout_seconds",
        "steering.methods.0.sweep_partciles": "sweep_particles",
        "steering.methods.1.strenght": "strength",
        "tracking.0.experimnt": "experiment",
        "tracking.1.nmae": "name",
    }


def test_the_configuration_knows_no_extension():
    """Neither its fields nor its rules name a row of a table, but as the default of `use`, or a setting of a class."""
    defaults = {"unet", "ddim", "ppo", "frozen_taps"}
    rows = {row for table in TABLES.values() for row in table} - {*defaults, "lora"}  # also an adaptation
    classes = [declared_settings(table.load(row)) for table in TABLES.values() for row in table]
    own = {name for settings in classes if settings for name in settings.model_fields}
    # also the run's, its backbone's, or the endpoint's
    own -= {"project", "source", "revision", "device", "ready_seconds"}
    for module in (config_module, validation_module):
        nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        fields = {
            node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not texts & (rows | own)
        assert not (fields | read) & own


def test_what_depends_on_a_broken_field_is_not_guessed():
    """A block of a size that is not a number says nothing about the images per iteration."""
    assert len(problems("train.block_images=many", "train.num_workers=0")) == 2


def test_an_entry_of_a_list_is_changed_by_name_or_index():
    """Others stay as they are; an entry that is not there is refused with the known ones."""
    config = resolved("rewards.jpeg_compressibility.weight=0.5", "rewards.0.timeout_seconds=9")
    assert [(one.name, one.weight, one.timeout_seconds) for one in config.rewards] == [
        ("shapes_verifier", 1.0, 9.0),
        ("jpeg_compressibility", 0.5, 300.0),
    ]
    with pytest.raises(ConfigError, match=r"rewards = 'jpeg': names no entry .*jpeg_compressibility"):
        resolved("rewards.jpeg.weight=1")


def test_another_extension_does_not_inherit_settings():
    """They are of the one that was replaced; what the framework does with either stays."""
    config = resolved("kernel.num_steps=7", "kernel.noise=0.3", "algorithm.use=grpo")
    assert (config.algorithm.own, config.kernel.own) == ({}, {"noise": 0.3})
    changed = merge(config.model_dump(), {"kernel": {"use": "cps"}})
    assert changed["kernel"] == {"use": "cps", "num_steps": 7}


def test_two_instances_of_one_reward_have_names_of_their_own():
    """The configuration gives the name; without one it is the row's, or the class's."""
    config = resolved(
        "rewards=[{use: colourfulness}, {use: colourfulness, name: again}, {use: 'some.module:Sharpness', weight: 0}]",
        "gate.reward=again",
    )
    assert config.reward_names == ("colourfulness", "again", "Sharpness")


@pytest.mark.parametrize(
    ("path", "entries"),
    [
        ("rewards", "[{use: shapes_verifier}, {use: colourfulness, name: NAME}]"),
        ("steering.methods", "[{use: best_of_n, name: NAME}]"),
        ("tracking", "[{use: mlflow, name: NAME}]"),
    ],
)
@pytest.mark.parametrize("name", ["a.b", "1", "ü", "a/b", "<b>", "x" * 65, "own"])
def test_names_fit_paths_of_fields_files_and_requests(path, entries, name):
    """In each list alike: a number would be an index, and a dot part of a path."""
    refused = set()
    try:
        resolved(f"{path}={entries.replace('NAME', json.dumps(name))}")
    except ConfigError as error:
        refused = {problem.path.rpartition(".")[2] for problem in error.problems}
    assert ("name" in refused) == (name != "own")


@pytest.mark.parametrize(
    ("path", "entries"),
    [
        ("rewards", "[{use: shapes_verifier}, {use: colourfulness, name: reward_mean}]"),
        ("steering.methods", "[{use: best_of_n, name: none}]"),
        ("tracking", "[{use: mlflow, name: a}, {use: wandb, name: a}]"),
    ],
)
def test_a_name_that_is_taken_is_refused(path, entries):
    """By what it means otherwise, or by another entry."""
    with pytest.raises(ConfigError, match=rf"{path}.*(has another meaning|is the name of two entries)"):
        resolved(f"{path}={entries}")


def test_a_bound_that_no_clock_can_hold_is_refused():
    """As a problem of the field, not of the reward that is called with it."""
    with pytest.raises(ConfigError, match=r"rewards\.0\.timeout_seconds"):
        resolved("rewards=[{use: shapes_verifier, timeout_seconds: 1e10}]")


@pytest.mark.parametrize(
    ("assignment", "path"),
    [("rewards=[]", "rewards"), ("rewards=null", "rewards"), ("gate.reward=no", "gate.reward"),
     ("prompts.source=~", "prompts.source")],
)  # fmt: skip
def test_one_wrong_value_is_one_problem(assignment, path):
    """What the search for further problems puts in its place is none of the user's."""
    with pytest.raises(ConfigError) as caught:
        resolved(assignment)
    assert [problem.path for problem in caught.value.problems] == [path]
