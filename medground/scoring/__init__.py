"""Predictions -> metrics with 95 % intervals (docs/evaluation.md); the baseline that never looks at the image.

Reading files of predictions, comparing two and writing them in other forms is here too, without a model.
"""

from medground.scoring.blind import blind_baseline
from medground.scoring.prediction import Prediction, side_word
from medground.scoring.scores import record_scores, score
from medground.set_iou import set_iou

__all__ = ["Prediction", "blind_baseline", "record_scores", "score", "set_iou", "side_word"]
