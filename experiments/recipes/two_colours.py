"""Two colours: an entropy weight that answers a world which changes every 100 000 steps.

Flennerhag et al., "Bootstrapped Meta-Learning", 2022, arXiv:2109.04504, section 5.1, with the settings of Luketina et
al., "Meta-Gradients in Non-Stationary Environments", CoLLAs 2022, where they are known: networks of 2 x 256 for policy
and value, plain gradient steps every 16 steps, discount 0.99, and a network of 2 x 64 that reads the mean rewards of
the last 10 rollouts and says the weight. Lifetimes are 2 million steps, a fifth of the paper's, so agents must be
quick: ours take steps of 0.3 for the policy and of 0.03 for the value, with a trace decay of 0.5 (the paper: 0.1 for
both, and the decay is 0 or 1 where it is known). The learned weight is between 0.13 and 0.35 and starts at 0.17; the
best fixed one is 0.15. With 0.1, agents that avoid both objects after a switch go on to do so, and a network that may
say 0.1 learns to say it there too. BMG looks L = 2 updates ahead (published: 8 to 16) and compares policies on the
states of both: with more steps that hold the bonus, the target pulls the weight up all the time. Its outer Adam has
eps 1e-5 (published: 1e-4), since its gradients are small.

The three methods differ in what moves the weight: nothing, the meta-gradient of the policy's loss with a bonus for
entropy (MG), or the distance to where the learner gets (BMG).
"""

from __future__ import annotations

import math
from dataclasses import replace

from experiments.recipes import OnlineRecipe
from experiments.train import Train
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper
from learned_rl.ppo import PPOConfig
from meta_optimizers.bootstrapped import BootstrappedConfig
from meta_optimizers.learning import OuterLossConfig
from meta_optimizers.outer_critic import OuterCriticConfig
from meta_optimizers.self_tuning import SelfTuningConfig
from meta_optimizers.truncated import TruncatedConfig

_NUMBERS = Hyper(
    learning_rate=0.3,
    gamma=0.99,
    gae_lambda=0.5,
    clip_range=math.inf,
    vf_coef=0.1,
    ent_coef=0.15,
    max_grad_norm=math.inf,
)
_AGENT = PPOConfig(
    n_envs=1,
    n_steps=16,
    n_epochs=1,
    n_minibatches=1,
    optimizer="sgd",
    normalize_advantage=False,
    hyper=_NUMBERS,
    agent=AgentConfig(hidden=(256, 256), activation="relu"),
)
_FIXED = Train(config=_AGENT, steps=2_000_000, seeds=8, checkpoints=200)
_OUTER = SelfTuningConfig(
    learning_rate=1e-3,
    eps=1e-4,
    max_grad_norm=math.inf,
    critic=OuterCriticConfig(source="agent", gamma=0.99, gae_lambda=0.5, normalize=False),
)
_BMG = replace(
    _OUTER,
    eps=1e-5,
    estimator=BootstrappedConfig(window=6, bootstrap=2, outer_data="fresh_reuse", states="ahead"),
    loss=OuterLossConfig(policy_entropy=0.0),
)
_MG = replace(
    _OUTER,
    estimator=TruncatedConfig(window=6, outer_data="fresh_reuse", outer_terms="last"),
    loss=OuterLossConfig(policy_entropy=0.15),
)
_LEARNED = replace(
    _FIXED,
    config=replace(_AGENT, hyper=_NUMBERS.replace(ent_coef=0.17)),
    hyperparameters="contextual",
    self_tune="ent_coef=0.13:0.35",
    set=("hyperparameters.hidden=[64,64]",),
)


def _recipe(method: str, about: str, train: Train) -> OnlineRecipe:
    return OnlineRecipe(f"two-colours-{method}", about, "two_colours", replace(train, label=method))


ONLINE = (
    _recipe("fixed", "a fixed entropy weight, --config.hyper.ent-coef", _FIXED),
    _recipe("mg", "an entropy weight learned by meta-gradient, from recent rewards", replace(_LEARNED, outer=_MG)),
    _recipe("bmg", "the same by bootstrapped meta-gradient", replace(_LEARNED, outer=_BMG)),
)
