"""AdamW with moments in 8 bits: what it saves, that it learns as AdamW does, and that it resumes bitwise."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from latentac.config.learning import Policy as PolicySettings
from latentac.runs.configuration import recipe_fields
from latentac.runs.resolution import resolve_all
from latentac.system.errors import ConfigError
from latentac.training.checkpoint import optimizer_tensors, read_state, restore_optimizer, write_state
from latentac.training.distributed import Mesh
from latentac.training.optimizers import policy_optimizer
from latentac.training.sharding import Sharding
from tests.latentac.trainers import make_trainer, same, snapshot

CPU = torch.device("cpu")
ALONE = Sharding(Mesh.single(CPU), wanted=False)
PACKAGES = Path(sys.prefix) / "optimizers"
"""Where `make install` puts bitsandbytes. In the environment, diffusers would import it in every process."""


@pytest.fixture
def eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGES))


def optimizer_of(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    settings = PolicySettings.model_validate({"optimizer": name, "learning_rate": 1e-2, "weight_decay": 0.1})
    return policy_optimizer(settings, parameters, 1e-10, CPU)


def descended(name: str, shape: tuple[int, ...], steps: int = 40) -> torch.Tensor:
    """Weights after so many steps towards 1, with gradients like those of a log-probability's mean."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    if len(shape) == 4:  # as the convolutions of a UNet are on a GPU
        parameter.data = parameter.data.to(memory_format=torch.channels_last)
    optimizer = optimizer_of(name, [parameter])
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        parameter.grad = 1e-6 * (parameter.detach() - 1 + 0.1 * torch.randn(shape, generator=generator))
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("installed", [False, True])
def test_a_missing_package_is_named_where_the_configuration_is_read(
    installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the field, the value and the command, before anything else is done; a broken one when it is built."""
    if installed:  # one whose native code does not load
        package = tmp_path / "broken_eight_bits" / "optim"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise OSError('libcudart.so: cannot open')")
        monkeypatch.setattr("latentac.training.optimizers._PACKAGE", "broken_eight_bits")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ConfigError, match=r"policy\.optimizer = 'adamw_8bit'.*libcudart\.so"):
            optimizer_of("adamw_8bit", [nn.Parameter(torch.zeros(1))])
        return
    monkeypatch.setattr("latentac.training.optimizers._PACKAGE", "no_such_package_of_anybody")
    with pytest.raises(ConfigError, match=r"policy\.optimizer = 'adamw_8bit'.*latentac\[optimizers\]"):
        resolve_all(recipe_fields("shapes-unet-smoke", "", ["policy.optimizer=adamw_8bit"]))


def test_moments_of_adamw_are_saved_under_the_names_that_they_had() -> None:
    """An earlier checkpoint still loads."""
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4))]
    optimizer = optimizer_of("adamw", parameters)
    for parameter in (parameters[0], parameters[2]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = {f"x.{index}.{name}" for index in (0, 2) for name in ("step", "exp_avg", "exp_avg_sq")}
    saved = optimizer_tensors(optimizer, "x", ALONE.whole)
    assert set(saved) == names
    state = optimizer.state_dict()["state"]
    assert all(torch.equal(saved[f"x.{index}.{name}"], state[index][name]) for index in state for name in state[index])


@pytest.mark.usefixtures("eight_bits")
@pytest.mark.parametrize("shape", [(64, 128), (100,), (16, 32, 3, 3)], ids=str)
def test_eight_bits_learn_as_adamw_does(shape: tuple[int, ...]) -> None:
    """Matrices, small tensors, whose moments stay in float32, and convolutions in another memory layout."""
    plain, eight = (descended(name, shape) for name in ("adamw", "adamw_8bit"))
    start = descended("adamw", shape, 0)
    assert float((eight - start).norm()) > 0.2 * float((1 - start).norm())
    assert float((eight - plain).norm()) < 0.05 * float((plain - start).norm())


@pytest.mark.usefixtures("eight_bits")
def test_the_state_takes_two_bytes_per_weight() -> None:
    """And little else: a scale for every 256 numbers, and two tables."""
    parameter = nn.Parameter(torch.zeros(512, 256))
    optimizer = optimizer_of("adamw_8bit", [parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    size = sum(tensor.nbytes for tensor in optimizer_tensors(optimizer, "x", ALONE.whole).values())
    assert 2 * parameter.numel() <= size < 2.1 * parameter.numel()


@pytest.mark.usefixtures("eight_bits")
def test_a_state_that_was_written_goes_on_bitwise(tmp_path: Path) -> None:
    """Codes, scales, tables and the number of steps, through a file."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(64, 128)), nn.Parameter(torch.randn(10))]
    gradients = [[torch.randn_like(each) for each in parameters] for _ in range(4)]

    def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], which: range) -> None:
        for index in which:
            for parameter, gradient in zip(parameters, gradients[index], strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    first = optimizer_of("adamw_8bit", parameters)
    stepped(first, parameters, range(2))
    write_state(tmp_path, optimizer_tensors(first, "x", ALONE.whole), {"history": [], "recoveries": []})
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    second = optimizer_of("adamw_8bit", copies)
    restore_optimizer(second, "x", read_state(tmp_path)[0], ALONE.own)
    stepped(first, parameters, range(2, 4))
    stepped(second, copies, range(2, 4))
    assert all(torch.equal(*pair) for pair in zip(parameters, copies, strict=True))
    assert same(optimizer_tensors(first, "x", ALONE.whole), optimizer_tensors(second, "x", ALONE.whole))


@pytest.mark.usefixtures("eight_bits")
@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_training_resumes_bitwise_with_eight_bits(adaptation: str, tmp_path: Path) -> None:
    """Two iterations, or one, a checkpoint, and one in another process's trainer."""
    sections: dict[str, Any] = {"policy": {"optimizer": "adamw_8bit", "adaptation": adaptation, "lora_rank": 128}}
    whole, before, after = (make_trainer(**sections) for _ in range(3))
    for _ in range(2):
        whole.iterate()
    before.iterate()
    tensors, progress = before.state()
    write_state(tmp_path, tensors, progress)
    assert any(tensor.dtype == torch.uint8 for tensor in tensors.values())
    after.load_state(*read_state(tmp_path))
    after.iterate()
    assert same(snapshot(whole), snapshot(after))


def test_eight_bits_with_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of the weights would cut the blocks that have one scale."""
    monkeypatch.setattr("latentac.training.optimizers._PACKAGE", "json")  # something that is installed
    given = ["policy.optimizer=adamw_8bit", "train.sharding=full"]
    with pytest.raises(ConfigError, match=r"policy\.optimizer = 'adamw_8bit'.*train\.sharding=none"):
        resolve_all(recipe_fields("shapes-unet-smoke", "", given))
