"""The public interface: each name and the module that it is imported from when it is first used."""

from .backbones import BACKBONES as BACKBONES
from .backbones import Denoiser as Denoiser
from .backbones import load_backbone as load_backbone
from .config.recipes import RECIPES as RECIPES
from .config.schema import Config as Config
from .critic import BODIES as BODIES
from .critic import Critic as Critic
from .critic import ValueFunction as ValueFunction
from .method.diffusion import GaussianTransition as GaussianTransition
from .method.diffusion import Kernel as Kernel
from .method.records import Conditioning as Conditioning
from .method.records import Scores as Scores
from .method.records import Trajectory as Trajectory
from .rewards import REWARDS as REWARDS
from .rewards import Reward as Reward
from .runs.configuration import load_config as load_config
from .runs.reporting.tracking import TRACKERS as TRACKERS
from .runs.reporting.tracking import Tracker as Tracker
from .sampling.kernels import KERNELS as KERNELS
from .sampling.policy import Policy as Policy
from .sampling.rollout import rollout as rollout
from .sampling.rollout import steered_rollout as steered_rollout
from .sampling.steering import STEERING as STEERING
from .sampling.steering import SteeredRollout as SteeredRollout
from .sampling.steering import Steering as Steering
from .sampling.steering import SteeringSettings as SteeringSettings
from .sampling.steering import SteeringState as SteeringState
from .serving.client import Client as Client
from .store import Store as Store
from .store import open_store as open_store
from .system.errors import ConfigError as ConfigError
from .system.errors import Diverged as Diverged
from .system.errors import LatentacError as LatentacError
from .system.errors import RewardError as RewardError
from .training.algorithms import ALGORITHMS as ALGORITHMS
from .training.algorithms import Algorithm as Algorithm
from .training.algorithms import Credit as Credit
from .training.algorithms import PolicyLoss as PolicyLoss
from .training.experiment import Experiment as Experiment
from .training.experiment import load_policy as load_policy
from .worlds.prompts import Prompt as Prompt
from .worlds.prompts import PromptSet as PromptSet
from .worlds.prompts import load_prompts as load_prompts

__all__: list[str]
__version__: str
