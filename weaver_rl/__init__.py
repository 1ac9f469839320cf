"""Reinforcement learning and fine-tuning on Weaver: loops, environments, rewards, evaluation.

Three levels, each written with the names of the one below: `train(model, tasks, reward)` and
`fine_tune(model, examples)`; `on_policy`, `off_policy`, `rejection`, `supervised`, `preference`
with a trainer of yours; the verbs of `weaver`.
Every module lists what it gives to users in `__all__`.
"""

from weaver.keywords import suggest_throughout
from weaver_rl import credit, curriculum, schedules
from weaver_rl.advantages import *
from weaver_rl.agent import *
from weaver_rl.algorithms.distillation import *
from weaver_rl.algorithms.policy import *
from weaver_rl.algorithms.preference import *
from weaver_rl.algorithms.rejection import *
from weaver_rl.algorithms.run import *
from weaver_rl.algorithms.supervised import *
from weaver_rl.checks import *
from weaver_rl.comparison import *
from weaver_rl.credit.marks import *
from weaver_rl.data import *
from weaver_rl.display import *
from weaver_rl.endpoint import *
from weaver_rl.evaluation import *
from weaver_rl.fine_tuning import *
from weaver_rl.loggers import *
from weaver_rl.mcp import *
from weaver_rl.objectives import *
from weaver_rl.others import *
from weaver_rl.plan import *
from weaver_rl.report import *
from weaver_rl.reward_models import *
from weaver_rl.rewards import *
from weaver_rl.rollouts import *
from weaver_rl.run_folder import *
from weaver_rl.sandbox import *
from weaver_rl.sweeps import *
from weaver_rl.tools import *
from weaver_rl.trackers import *
from weaver_rl.train import *
from weaver_rl.types import *

suggest_throughout(__name__, credit.__name__, curriculum.__name__, schedules.__name__)
del suggest_throughout
