"""ROUGE as a metric of the `evaluate` library, which takes seconds to import: `evaluate.load("carelm/evaluation/rouge.py")`
works offline. The measures are those of carelm.evaluation.rouge_measures.
"""

import datasets
import evaluate

from carelm.evaluation.rouge_measures import rouge


class Rouge(evaluate.Metric):
    """`compute(predictions=, references=)`; each reference is a text or several, of which the best counts."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Chin-Yew Lin. ROUGE: A Package for Automatic Evaluation of Summaries. 2004.",
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions, references, use_aggregator=True):
        scores = rouge(predictions, [[r] if isinstance(r, str) else r for r in references])
        return {name: float(values.mean()) if use_aggregator else values.tolist() for name, values in scores.items()}
