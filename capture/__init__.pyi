from .commands.capture import capture as capture
from .commands.evaluate import evaluate as evaluate
from .commands.evaluate_tasks import evaluate_tasks as evaluate_tasks
from .recording.ranks import Ranks as Ranks
from .recording.record import Progress as Progress
from .settings import CaptureSettings as CaptureSettings
from .tables.evaluation import Evaluation as Evaluation
from .tables.task_evaluation import TaskEvaluation as TaskEvaluation
