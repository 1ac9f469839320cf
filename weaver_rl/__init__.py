"""Reinforcement learning and fine-tuning on Weaver: loops, environments, rewards, evaluation.

Three levels, each written with the names of the one below: `train(model, tasks, reward)`;
`on_policy`, `off_policy`, `rejection`, `supervised` with environments; the verbs of `weaver`.
"""

from weaver_rl import schedules
from weaver_rl.advantages import ADVANTAGES
from weaver_rl.agent import Agent, Budget, BudgetExceeded
from weaver_rl.algorithms.policy import Result, off_policy, on_policy
from weaver_rl.algorithms.rejection import Keep, rejection
from weaver_rl.algorithms.run import Run, open_run
from weaver_rl.algorithms.supervised import SupervisedPlan, TooLong, supervised
from weaver_rl.checks import check
from weaver_rl.data import TaskStream, read_tasks, split_tasks
from weaver_rl.display import Display, draw_curve
from weaver_rl.evaluation import Evaluate, Evaluation, evaluate, evaluator
from weaver_rl.loggers import JsonlLogger, Logger, Loggers, TensorBoardLogger, WandbLogger
from weaver_rl.objectives import Objective
from weaver_rl.plan import LogprobGapError, Plan, check_gap, rounding_gap
from weaver_rl.report import write_report
from weaver_rl.rewards import GroupReward, Reward, group_reward, judge, weighted
from weaver_rl.rollouts import (
    Environment,
    GroupEnvironment,
    RolloutsFailedError,
    each,
    sample_groups,
    single_turn,
)
from weaver_rl.run_folder import (
    Manifest,
    RunFolder,
    manifests,
    open_run_folder,
    restore,
    save_checkpoint,
)
from weaver_rl.tools import describe, use_tools
from weaver_rl.train import Trained, train
from weaver_rl.types import Failure, Group, Reply, Rollout, Score, Segment, Task, Trajectory

__all__ = [
    "ADVANTAGES",
    "Agent",
    "Budget",
    "BudgetExceeded",
    "Display",
    "Environment",
    "Evaluate",
    "Evaluation",
    "Failure",
    "Group",
    "GroupEnvironment",
    "GroupReward",
    "JsonlLogger",
    "Keep",
    "Logger",
    "Loggers",
    "LogprobGapError",
    "Manifest",
    "Objective",
    "Plan",
    "Reply",
    "Result",
    "Reward",
    "Rollout",
    "RolloutsFailedError",
    "Run",
    "RunFolder",
    "Score",
    "Segment",
    "SupervisedPlan",
    "Task",
    "TaskStream",
    "TensorBoardLogger",
    "TooLong",
    "Trained",
    "Trajectory",
    "WandbLogger",
    "check",
    "check_gap",
    "describe",
    "draw_curve",
    "each",
    "evaluate",
    "evaluator",
    "group_reward",
    "judge",
    "manifests",
    "off_policy",
    "on_policy",
    "open_run",
    "open_run_folder",
    "read_tasks",
    "rejection",
    "restore",
    "rounding_gap",
    "sample_groups",
    "save_checkpoint",
    "schedules",
    "single_turn",
    "split_tasks",
    "supervised",
    "train",
    "use_tools",
    "weighted",
    "write_report",
]
