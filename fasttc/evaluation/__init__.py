"""How good transcoders are: fit, sparsity, what replacing MLPs by them costs, how far they moved from a base.

And how good a model is at a task, as it is or with its MLPs replaced.
"""

from fasttc.evaluation.adapter import AdapterEvaluation as AdapterEvaluation
from fasttc.evaluation.adapter import Recovery as Recovery
from fasttc.evaluation.adapter import evaluate_adapters as evaluate_adapters
from fasttc.evaluation.adapter import recovery as recovery
from fasttc.evaluation.carry_over import LayerCarryOver as LayerCarryOver
from fasttc.evaluation.carry_over import carry_over as carry_over
from fasttc.evaluation.evaluator import evaluate as evaluate
from fasttc.evaluation.report import FeatureReport as FeatureReport
from fasttc.evaluation.report import LayerReport as LayerReport
from fasttc.evaluation.report import Report as Report
from fasttc.evaluation.responses import response_length as response_length
from fasttc.evaluation.tasks import Question as Question
from fasttc.evaluation.tasks import TaskReport as TaskReport
from fasttc.evaluation.tasks import evaluate_task as evaluate_task
from fasttc.evaluation.tasks import question_ids as question_ids
from fasttc.evaluation.tasks import read_questions as read_questions

__all__ = [
    "AdapterEvaluation",
    "FeatureReport",
    "LayerCarryOver",
    "LayerReport",
    "Question",
    "Recovery",
    "Report",
    "TaskReport",
    "carry_over",
    "evaluate",
    "evaluate_adapters",
    "evaluate_task",
    "question_ids",
    "read_questions",
    "recovery",
    "response_length",
]
